"""Tests of differences: closed forms, and how often they err in simulations."""

from itertools import product

import numpy as np
import pytest

from eval.intervals import Difference, bootstrap_interval, paired_differences, values_of
from eval.significance import effect_size, holm, non_inferior, non_inferiority_power, sign_flip_p, win_rate


def valued(values, prompts=None):
    prompts = [f"p{index}" for index in range(len(values))] if prompts is None else prompts
    return [
        {"group": f"{prompt}/{index:06d}", "category": prompt, "n_images": 4, "value": float(value)}
        for index, (value, prompt) in enumerate(zip(values, prompts, strict=True))
    ]


def counted(tables):
    return [
        {
            "group": f"{category}/{index:06d}",
            "category": category,
            "n_images": sum(row),
            "counts": dict(zip("xyz", row, strict=False)),
        }
        for category, table in tables.items()
        for index, row in enumerate(table)
    ]


def test_all_differences_of_one_sign_have_the_smallest_p():
    for n in (1, 3, 8):
        assert sign_flip_p(valued(np.arange(1, n + 1))) == 2 / 2**n


@pytest.mark.parametrize("seed", range(4))
def test_p_is_that_of_an_enumeration_by_hand(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.5, 1, 7), rng.normal(0, 1, 7)
    sums = np.array([np.abs(np.dot(signs, a - b)) for signs in product((1, -1), repeat=7)])
    expected = (sums >= sums[0] - 1e-12).mean()
    assert sign_flip_p(valued(a - b)) == sign_flip_p(valued(b - a)) == expected


def test_ties_and_rounding_count_as_as_large():
    # 0.1 + 0.2 and 0.3 are the same number but for rounding
    assert sign_flip_p(valued([0.1, 0.2, 0.3])) == 2 / 8
    assert sign_flip_p(valued([0.1, 0.2, -0.3])) == 1
    assert sign_flip_p(valued([0, 0, 0])) == 1


def test_seeded_flips_come_near_the_exact_p_and_never_give_0():
    rng = np.random.default_rng(5)
    differences = valued(rng.normal(0.6, 1, 12) - rng.normal(0, 1, 12))
    exact = sign_flip_p(differences, n_flips=2**12)
    sampled = sign_flip_p(differences, n_flips=2**12 - 1)
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=4 * (exact / 4096) ** 0.5)
    assert sign_flip_p(valued(np.ones(40)), n_flips=99) == 1 / 100


def test_a_seed_gives_one_p_whatever_the_order_and_the_blocks(monkeypatch):
    rng = np.random.default_rng(6)
    a, b = valued(rng.normal(0.3, 1, 30)), valued(rng.normal(0, 1, 30))
    differences = paired_differences(a, b)
    expected = sign_flip_p(differences, n_flips=500)
    assert sign_flip_p(paired_differences(a[::-1], b), n_flips=500) == expected
    assert sign_flip_p(differences, n_flips=500, seed=1) != expected
    exact = sign_flip_p(differences[:8])
    monkeypatch.setattr("eval.significance.BLOCK", 700)
    assert sign_flip_p(differences, n_flips=500) == pytest.approx(expected, abs=0.1)
    assert sign_flip_p(differences[:8]) == exact


def test_groups_of_a_cluster_are_exchanged_together():
    prompts = [f"p{index // 5}" for index in range(20)]
    differences = valued(np.ones(20), prompts)
    assert sign_flip_p(differences) == 2 / 2**4, "categories, unless told otherwise"
    assert sign_flip_p(differences, cluster="prompt") == 2 / 2**4
    assert sign_flip_p(differences, cluster=None) < 0.001
    with pytest.raises(ValueError, match="cluster"):
        sign_flip_p(differences, cluster="image")


def test_entropies_are_exchanged_by_category():
    rng = np.random.default_rng(6)
    sides = [
        {f"c{k}": rng.multinomial(8, p, size=3).tolist() for k in range(7)} for p in ([0.6, 0.3, 0.1], [1 / 3] * 3)
    ]
    a, b = (counted(side) for side in sides)
    x, y = ([entry["value"] for entry in values_of(side, "category_entropy")] for side in (a, b))
    assert len(x) == 7
    differences, expected = paired_differences(a, b, "category_entropy"), valued(np.subtract(x, y))
    for cluster in (None, "prompt", "category"):
        assert sign_flip_p(differences, cluster=cluster) == sign_flip_p(expected)
    assert effect_size(differences) == pytest.approx(effect_size(expected))
    assert win_rate(differences) == win_rate(expected)


@pytest.mark.parametrize(("n", "cluster"), [(8, None), (24, None), (24, "category")])
def test_nominal_rate_of_false_findings(n, cluster):
    rng = np.random.default_rng(7)
    prompts = [f"p{index // 3}" for index in range(n)] if cluster else None
    rejected = 0
    for _ in range(600):
        # skewed, of unequal spread, and (clustered) correlated within a prompt: symmetric under exchange alone
        shift = np.repeat(rng.standard_t(3, n // 3), 3) if cluster else 0
        a, b = rng.gamma(1, np.arange(1, n + 1)) + shift, rng.gamma(1, np.arange(1, n + 1))
        rejected += sign_flip_p(valued(a - b, prompts), n_flips=255, seed=3, cluster=cluster) <= 0.05
    # binomial error of 600 trials: 0.9 points
    assert 0.025 <= rejected / 600 <= 0.075


def test_holms_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"p-values in \[0, 1\]"):
        holm([0.1, float("nan")])


def test_holm_keeps_the_familys_rate():
    p = np.random.default_rng(8).uniform(size=(4000, 6))
    assert np.mean([min(holm(row)) <= 0.05 for row in p]) == pytest.approx(0.05, abs=0.012)


def test_effect_size_and_win_rate_by_hand():
    differences = valued([1, 3, 2, 0])
    assert effect_size(differences) == pytest.approx(1.5 / np.std([1, 3, 2, 0], ddof=1))
    assert effect_size(valued([-1, -3, -2, 0])) == -effect_size(differences)
    assert win_rate(differences) == (3 + 0.5) / 4
    assert win_rate(differences, higher_is_better=False) == 0.5 / 4
    assert effect_size(differences[:1]) is None
    assert effect_size(paired_differences(valued([0.3, 0.6]), valued([0.2, 0.5]))) is None, "but for rounding the same"


def test_non_inferiority_is_the_intervals_bound_against_the_margin():
    loss = Difference(-0.2, -0.5, 0.1, 40)
    assert non_inferior(loss, 0.6) is True
    assert non_inferior(loss, 0.5) is False
    assert non_inferior(Difference(0.2, -0.1, 0.5, 40), 0.4, higher_is_better=False) is False
    assert non_inferior(Difference(0.2, -0.1, 0.5, 40), 0.6, higher_is_better=False) is True
    assert non_inferior(Difference(0.2, None, None, 1), 0.6) is None
    for margin in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="margin > 0"):
            non_inferior(loss, margin)


def test_non_inferiority_errs_as_rarely_as_its_interval():
    """A loss of just the margin is called quality kept in about 2.5 % of the runs."""
    rng = np.random.default_rng(9)
    kept = 0
    for _ in range(600):
        differences = valued(rng.normal(-0.5, 0.4, 30) - rng.normal(0, 0.4, 30))
        kept += non_inferior(Difference(*bootstrap_interval(differences, n_resamples=300), 30), 0.5)
    assert kept / 600 <= 0.05


def test_no_exchanges_are_refused():
    with pytest.raises(ValueError, match="n_flips"):
        sign_flip_p(valued([1, 2, 3]), n_flips=0)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0])
def test_the_power_of_non_inferiority_is_how_often_a_harmless_method_is_found_so(margin):
    """Simulated: differences of 25 categories, 0 in truth."""
    rng = np.random.default_rng(0)
    n, error = 25, 0.2
    means = rng.normal(0, error, 4000)
    reach = 1.959964 * error
    found = np.mean([non_inferior(Difference(mean, mean - reach, mean + reach, n), margin) for mean in means])
    assert non_inferiority_power(-reach, reach, margin) == pytest.approx(found, abs=0.03)
    assert non_inferiority_power(0.3 - reach, 0.3 + reach, margin) == non_inferiority_power(-reach, reach, margin)
