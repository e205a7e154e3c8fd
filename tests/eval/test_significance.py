"""Tests of differences: closed forms, and how often they err in simulations."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from eval.intervals import Difference, bootstrap_interval, paired_differences, values_of
from eval.significance import bootstrap_t_p, effect_size, holm, non_inferior, non_inferiority_power, win_rate


def p_by_hand(table, draws):
    """Return the p-value over resamples of clusters [[value, ...], ...], given the clusters of each resample."""

    def mean_and_error(clusters):
        n = sum(map(len, clusters))
        mean = sum(map(sum, clusters)) / n
        squares = sum((sum(values) - len(values) * mean) ** 2 for values in clusters)
        return mean, (len(clusters) / (len(clusters) - 1) * squares) ** 0.5 / n

    observed, error = mean_and_error(table)
    as_large = total = 0
    for draw in draws:
        mean, own_error = mean_and_error([table[index] for index in draw])
        as_large += own_error < 1e-12 or abs(mean - observed) / own_error >= abs(observed) / error
        total += 1
    return (1 + as_large) / (1 + total)


@pytest.fixture(scope="module")
def clustered(grouped):
    """Return groups with the values of clusters [[value, ...], ...]."""
    return lambda table: grouped(
        np.concatenate(table), [f"p{index:02d}" for index, values in enumerate(table) for _ in values]
    )


def test_p_is_that_of_a_loop_by_hand(clustered, grouped):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        table = [rng.normal(0.4, 1, size).tolist() for size in (1, 2, 2, 5, 7, 3)]
        draws = np.random.default_rng(seed).integers(6, size=(199, 6))
        assert bootstrap_t_p(clustered(table), n_resamples=199, seed=seed) == p_by_hand(table, draws)
    # All resamples of four clusters: four of them consist of a single cluster, have no error and count.
    for values in ([5, 6, 7, 8.5], [5, 5, 5, 6], [0, 0, 1, 1]):
        exact = p_by_hand([[value] for value in values], product(range(4), repeat=4))
        p = bootstrap_t_p(grouped(values), n_resamples=40_000)
        assert p == pytest.approx(exact, abs=0.006) and p > 0.014


def test_p_of_many_normal_values_is_near_a_t_tests(grouped):
    rng = np.random.default_rng(3)
    for shift in (0, 0.2):
        values = rng.normal(shift, 1, 100)
        assert bootstrap_t_p(grouped(values)) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.02)


def test_p_depends_on_no_sign_scale_order_or_block(grouped, monkeypatch):
    rng = np.random.default_rng(6)
    a, b = grouped(rng.normal(0.3, 1, 30)), grouped(rng.normal(0, 1, 30))
    differences = paired_differences(a, b)
    expected = bootstrap_t_p(differences, n_resamples=500)
    assert 0.01 < expected < 0.99
    for other in (paired_differences(b, a), paired_differences(a[::-1], b)):
        assert bootstrap_t_p(other, n_resamples=500) == expected
    for scale in (1e-15, 1e15):
        scaled = [{**entry, "value": scale * entry["value"]} for entry in differences]
        assert bootstrap_t_p(scaled, n_resamples=500) == expected
    assert any(bootstrap_t_p(differences, n_resamples=500, seed=seed) != expected for seed in range(1, 4))
    precise = bootstrap_t_p(differences, n_resamples=4000)
    monkeypatch.setattr("eval.intervals.BLOCK", 350)
    assert bootstrap_t_p(differences, n_resamples=4000) == pytest.approx(precise, abs=0.02)


def test_p_is_never_0_and_none_where_it_has_no_meaning(grouped, clustered):
    assert bootstrap_t_p(grouped(np.arange(100, 140)), n_resamples=99) == 1 / 100
    assert bootstrap_t_p(grouped([1, 2, 3])) is None, "too few clusters"
    assert bootstrap_t_p(grouped([0] * 8)) == bootstrap_t_p(grouped([0.1, 0.2, -0.3, 0.1, 0.2, -0.3])) == 1
    assert bootstrap_t_p(grouped([0.3 - 0.2, 0.1] * 4)) is None, "equal except for rounding"
    assert bootstrap_t_p(clustered([[0.5], [0.5] * 2, [0.5] * 3, [0.5] * 4])) is None
    assert bootstrap_t_p(clustered([[1.0], [0.5] * 2, [0.25] * 4, [0.125] * 8])) < 1
    with pytest.raises(ValueError, match="n_resamples"):
        bootstrap_t_p(grouped([1, 2, 3]), n_resamples=0)


def test_groups_of_a_cluster_count_as_one(clustered):
    rng = np.random.default_rng(2)
    means, sizes = [0.1, 0.3, 0.4, -0.2, 0.6], [8, 4, 6, 7, 8]
    table = [(mean + rng.normal(0, 0.01, size)).tolist() for mean, size in zip(means, sizes, strict=True)]
    differences = clustered(table)
    assert bootstrap_t_p(differences) == bootstrap_t_p(differences, cluster="prompt") > 0.1
    assert bootstrap_t_p(differences, cluster=None) < 0.001
    assert effect_size(differences) == pytest.approx(np.mean(means) / np.std(means, ddof=1), rel=0.05)
    assert (win_rate(differences), win_rate(differences, cluster=None)) == (4 / 5, 26 / 33)
    assert win_rate(clustered([[3.0, -1.0, -1.0], [-1.0]])) == 1 / 2, "by its mean, not by the number of its groups"
    for test in (bootstrap_t_p, effect_size, win_rate):
        with pytest.raises(ValueError, match="cluster"):
            test(differences, cluster="image")


def test_entropies_are_tested_by_category(grouped):
    rng = np.random.default_rng(6)
    categories = [f"c{k}" for k in range(7) for _ in range(3)]
    a, b = (grouped(rng.multinomial(8, p, size=21), categories) for p in ([0.6, 0.3, 0.1], [1 / 3] * 3))
    x, y = ([entry["value"] for entry in values_of(side, "category_entropy")] for side in (a, b))
    assert len(x) == 7
    differences, expected = paired_differences(a, b, "category_entropy"), grouped(np.subtract(x, y))
    for test in (bootstrap_t_p, effect_size, win_rate):
        for cluster in (None, "prompt", "category"):
            assert test(differences, cluster=cluster) == pytest.approx(test(expected))


@pytest.fixture(scope="module")
def size_of_test(grouped):
    """Return how often differences of mean 0 are significant at 5 %."""

    def size(draw, trials, sizes=None):
        rng = np.random.default_rng(7)
        prompts = None if sizes is None else np.repeat([f"p{index}" for index in range(len(sizes))], sizes).tolist()
        p_values = [
            bootstrap_t_p(grouped(draw(rng), prompts), n_resamples=199, seed=seed) or 1 for seed in range(trials)
        ]
        return np.mean(np.array(p_values) <= 0.05)

    return size


def test_the_size_where_groups_of_a_cluster_are_alike(size_of_test):
    """By single groups it would be 29 %. Binomial error of 300 trials: 1.3 points."""
    sizes = [1, 2, 3, 4, 5, 6] * 3
    size = size_of_test(lambda rng: np.repeat(rng.normal(size=18), sizes) + rng.normal(0, 0.5, 63), 300, sizes)
    assert 0.02 <= size <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("k", [11, 20])
@pytest.mark.parametrize(
    ("draw", "lowest", "highest"),
    [
        (lambda rng, k: rng.normal(size=k), 0.03, 0.06),
        (lambda rng, k: rng.exponential(size=k) - 1, 0.05, 0.08),
        (lambda rng, k: rng.gamma(0.5, size=k) - 0.5, 0.06, 0.09),
    ],
    ids=["normal", "exponential", "gamma"],
)
def test_the_size_is_as_documented(draw, lowest, highest, k, size_of_test):
    """The numbers of docs/metrics.md. Binomial error of 4000 trials: 0.4 points."""
    assert lowest <= size_of_test(lambda rng: draw(rng, k), 4000) <= highest


def test_holm_by_a_known_example_and_simulated():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (holm([0.6, 0.9]), holm([0.02]), holm([])) == ([1, 1], [0.02], [])
    with pytest.raises(ValueError, match=r"p-values in \[0, 1\]"):
        holm([0.1, float("nan")])
    p = np.random.default_rng(8).uniform(size=(1500, 6))
    assert np.mean([min(holm(row)) <= 0.05 for row in p]) == pytest.approx(0.05, abs=0.02)


def test_effect_size_and_win_rate_by_hand(grouped):
    differences = grouped([1, 3, 2, 0])
    assert effect_size(differences) == pytest.approx(1.5 / np.std([1, 3, 2, 0], ddof=1))
    assert effect_size(grouped([-1, -3, -2, 0])) == -effect_size(differences)
    assert win_rate(differences) == (3 + 0.5) / 4 and win_rate(differences, higher_is_better=False) == 0.5 / 4
    assert effect_size(differences[:1]) is None
    assert effect_size(grouped([0.3 - 0.2, 0.6 - 0.5])) is None, "equal except for rounding"


def test_non_inferiority_is_the_intervals_limit_against_the_margin(grouped):
    loss, gain = Difference(-0.2, -0.5, 0.1, 40), Difference(0.2, -0.1, 0.5, 40)
    assert (non_inferior(loss, 0.6), non_inferior(loss, 0.5)) == (True, False)
    assert [non_inferior(gain, margin, higher_is_better=False) for margin in (0.4, 0.6)] == [False, True]
    assert non_inferior(Difference(0.2, None, None, 1), 0.6) is None
    for margin in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="margin > 0"):
            non_inferior(loss, margin)
    # a loss that equals the margin is called non-inferior in about 2.5 % of the runs
    rng, n_non_inferior = np.random.default_rng(9), 0
    for _ in range(200):
        differences = grouped(rng.normal(-0.5, 0.4, 30) - rng.normal(0, 0.4, 30))
        n_non_inferior += non_inferior(Difference(*bootstrap_interval(differences, n_resamples=200), 30), 0.5)
    assert n_non_inferior / 200 <= 0.07


@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_the_power_of_non_inferiority_is_how_often_a_harmless_method_is_non_inferior(margin):
    """Simulated with differences of 25 categories whose true mean is 0."""
    n, error = 25, 0.2
    half_width = 1.959964 * error
    means = np.random.default_rng(0).normal(0, error, 4000)
    intervals = [Difference(mean, mean - half_width, mean + half_width, n) for mean in means]
    power = non_inferiority_power(-half_width, half_width, margin)
    assert power == pytest.approx(np.mean([non_inferior(interval, margin) for interval in intervals]), abs=0.03)
    assert non_inferiority_power(0.3 - half_width, 0.3 + half_width, margin) == pytest.approx(power)
