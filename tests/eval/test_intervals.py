"""Intervals: coverage, pairing, determinism, and what cannot be estimated."""

from __future__ import annotations

import numpy as np
import pytest

from eval.aggregates import AGGREGATES, CategoryEntropy, aggregate_named
from eval.attributes import entropy
from eval.intervals import bootstrap_interval, difference_of, interval_of, paired_difference


def valued(values, prompts=None, categories=None):
    """Groups with values: one prompt and category each, unless given."""
    prompts = [f"p{index}" for index in range(len(values))] if prompts is None else prompts
    categories = prompts if categories is None else categories
    return [
        {"group": f"{prompt}/{index:06d}", "category": category, "n_images": 4, "value": float(value)}
        for index, (value, prompt, category) in enumerate(zip(values, prompts, categories, strict=True))
    ]


def counted(tables):
    """Groups with label counts: {category: [[counts of a group], ...]}."""
    return [
        {
            "group": f"{category}/{index:06d}",
            "category": category,
            "n_images": int(sum(row)),
            "counts": {f"label{label}": int(count) for label, count in enumerate(row) if count},
        }
        for category, table in tables.items()
        for index, row in enumerate(table)
    ]


def random_counts(rng, groups, categories=3, labels=4, images=4):
    return {
        f"c{number}": np.stack([rng.multinomial(images, rng.dirichlet(np.ones(labels))) for _ in range(groups)])
        for number in range(categories)
    }


def test_mean_is_the_mean_and_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_interval(valued(values))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)


@pytest.mark.parametrize("groups", [8, 40])
def test_coverage_of_a_skewed_mean(groups):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        _, low, high = bootstrap_interval(valued(rng.gamma(4, 0.25, groups)), n_resamples=500)
        hits += low <= 1 <= high
    # binomial error of 400 trials: 1.1 points; a percentile interval of few skewed values is known to lie below
    assert (0.88 if groups == 8 else 0.92) <= hits / 400 <= 0.98


@pytest.mark.parametrize("groups", [2, 10])
def test_coverage_of_an_entropy(groups):
    """Of its expectation: what plain percentiles miss nearly always, since resampling lowers an entropy."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        table = {f"c{c}": rng.multinomial(4, [0.4, 0.3, 0.2, 0.1], size=groups) for c in range(8)}
        found.append(bootstrap_interval(counted(table), "category_entropy", n_resamples=300))
    expectation = np.mean([interval.value for interval in found])
    assert 0.90 <= np.mean([interval.low <= expectation <= interval.high for interval in found]) <= 0.99


def test_paired_difference_is_narrower_on_correlated_values():
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 1, 100)
    a, b = valued(prompts + rng.normal(0.2, 0.1, 100)), valued(prompts + rng.normal(0, 0.1, 100))
    found = paired_difference(a, b)
    assert found.n == 100
    assert found.low <= 0.2 <= found.high
    unpaired = [bootstrap_interval(groups) for groups in (a, b)]
    assert found.difference == pytest.approx(unpaired[0].value - unpaired[1].value)
    assert found.high - found.low < 0.3 * min(interval.high - interval.low for interval in unpaired)


def test_paired_difference_uses_the_same_resamples():
    values = np.random.default_rng(4).normal(size=30)
    found = paired_difference(valued(values + 1), valued(values))
    # whichever groups are drawn, each differs by 1
    assert found[:3] == pytest.approx((1, 1, 1))
    tables = random_counts(np.random.default_rng(4), 6)
    assert paired_difference(counted(tables), counted(tables), "category_entropy")[:3] == (0, 0, 0)


def test_swapping_the_methods_mirrors_the_interval():
    rng = np.random.default_rng(5)
    a, b = valued(rng.normal(size=30)), valued(rng.normal(size=30))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there[:3] == pytest.approx((-back.difference, -back.high, -back.low))


@pytest.mark.parametrize("cluster", [None, "prompt"])
def test_deterministic_whatever_the_order(cluster):
    rng = np.random.default_rng(6)
    groups = valued(rng.normal(size=40), prompts=[f"p{index % 8}" for index in range(40)])
    expected = bootstrap_interval(groups, cluster=cluster)
    rng.shuffle(groups)
    assert bootstrap_interval(groups, cluster=cluster) == expected
    assert bootstrap_interval(groups, seed=1, cluster=cluster) != expected
    tables = counted(random_counts(rng, 6))
    expected = bootstrap_interval(tables, "category_entropy", cluster=None)
    assert bootstrap_interval(tables[::-1], "category_entropy", cluster=None) == expected


def test_blocks_do_not_change_the_distribution(monkeypatch):
    groups = valued(np.random.default_rng(7).normal(size=50))
    expected = bootstrap_interval(groups, n_resamples=4000)
    monkeypatch.setattr("eval.intervals._BLOCK", 350)
    assert bootstrap_interval(groups, n_resamples=4000) == pytest.approx(expected, abs=0.02)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(8)
    shift = np.repeat(rng.normal(0, 1, 10), 10)
    groups = valued(shift + rng.normal(0, 0.1, 100), prompts=[f"p{index // 10}" for index in range(100)])
    flat, clustered = bootstrap_interval(groups), bootstrap_interval(groups, cluster="prompt")
    assert clustered.value == flat.value
    # the standard error is that of 10 prompts, not of 100 groups
    ratio = (clustered.high - clustered.low) / (flat.high - flat.low)
    assert ratio == pytest.approx(10**0.5, rel=0.12)
    assert bootstrap_interval(groups, cluster="category") == clustered


def test_clusters_with_independent_groups_agree_with_a_naive_loop():
    rng = np.random.default_rng(9)
    values, prompts = rng.normal(size=24), np.repeat(np.arange(6), [2, 3, 4, 4, 5, 6])
    found = bootstrap_interval(valued(values, prompts=[f"p{prompt}" for prompt in prompts]), cluster="prompt")
    means = []
    for _ in range(4000):
        drawn = [rng.choice(values[prompts == prompt], (prompts == prompt).sum()) for prompt in rng.integers(6, size=6)]
        means.append(np.concatenate(drawn).mean())
    low, high = values.mean() + (6 / 5) ** 0.5 * (np.quantile(means, [0.025, 0.975]) - np.mean(means))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)


def test_entropy_resamples_within_categories():
    # each category has but one label: pooled over categories the entropy would vary, within them it is always 0
    tables = {"a": [[4, 0]] * 3, "b": [[0, 4]] * 3}
    assert bootstrap_interval(counted(tables), "category_entropy") == (0, 0, 0)
    groups = counted(random_counts(np.random.default_rng(10), 5))
    by_hand = []
    for category in ("c0", "c1", "c2"):
        members = [group["counts"] for group in groups if group["category"] == category]
        by_hand.append(entropy([sum(counts.get(f"label{label}", 0) for counts in members) for label in range(4)]))
    assert bootstrap_interval(groups, "category_entropy").value == pytest.approx(np.mean(by_hand))


def test_entropy_refuses_a_small_category_and_names_it():
    tables = {"plenty": [[4, 0]] * 3, "little": [[3, 1]]}
    with pytest.raises(ValueError, match=r"'little'.*at least 8 images.*got 4"):
        bootstrap_interval(counted(tables), "category_entropy")


def test_one_unit_has_a_value_and_no_interval():
    assert bootstrap_interval(valued([0.5])) == (0.5, None, None)
    assert paired_difference(valued([0.5]), valued([0.25])) == (0.25, None, None, 1)
    value, low, high = bootstrap_interval(counted({"a": [[4, 4]] * 3, "b": [[4, 4]]}), "category_entropy")
    assert value > 0
    assert low is None
    assert high is None
    one_prompt = valued([1, 2, 3], prompts=["p", "p", "p"])
    assert bootstrap_interval(one_prompt, cluster="prompt") == (2, None, None)


def test_unpaired_groups_are_listed():
    a = valued([1, 2, 3])
    with pytest.raises(ValueError, match=r"\[p2/000002\] \(1\) only in the first and \[\] \(0\)"):
        paired_difference(a, a[:2])
    with pytest.raises(ValueError, match=r"only in the second"):
        paired_difference(a[:2], a)
    with pytest.raises(ValueError, match=r"number of images.*p1/000001"):
        paired_difference(a, [{**group, "n_images": 3} if "p1" in group["group"] else group for group in a])
    with pytest.raises(ValueError, match=r"every group once.*p0/000000"):
        bootstrap_interval([*a, a[0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 95}, "level"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"aggregate": "median"}, "category_entropy.*mean"),
        ({"aggregate": "category_entropy"}, "'counts' in every group"),
        ({"cluster": "image"}, "cluster"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(valued(np.arange(9)), **arguments)


def test_more_refusals():
    with pytest.raises(ValueError, match="at least one group"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"finite.*p1/000001"):
        bootstrap_interval(valued([1, np.nan]))
    with pytest.raises(ValueError, match="categories are fixed"):
        bootstrap_interval(counted({"a": [[4, 4]] * 3}), "category_entropy", cluster="category")


def test_aggregates_by_name():
    assert set(AGGREGATES) == {"mean", "category_entropy"}
    custom = CategoryEntropy()
    assert aggregate_named(custom) is custom
    assert aggregate_named("mean").value(valued([3, 1, 2])) == 2


def halved(values, statistic=np.mean, groups=None):
    """The document of a number of the whole set, with its halves, as a SetMetric writes it: one image a group."""
    n = len(values)
    halves = [np.random.default_rng(seed).permutation(n)[: n // 2] for seed in range(20)]
    return {
        "metric": "set",
        "aggregate": "subsets",
        "value": float(statistic(values)),
        "n_groups": n,
        "groups": [],
        "groups_sha256": groups or f"{n} groups",
        "subset_share": 0.5,
        "subsets": [
            {"seed": seed, "n_groups": n // 2, "n_images": n // 2, "value": float(statistic(values[half]))}
            for seed, half in enumerate(halves)
        ],
    }


@pytest.mark.parametrize("n", [7, 60])
def test_coverage_from_halves(n):
    rng = np.random.default_rng(11)
    alone = paired = 0
    for _ in range(500):
        shared, a, b = rng.normal(size=n), rng.normal(1, 0.2, n), rng.normal(0, 0.2, n)
        _, low, high = interval_of(halved(shared))
        alone += low <= 0 <= high
        _, low, high, count = difference_of(halved(shared + a), halved(shared + b))
        paired += low <= 1 <= high
        assert count == n
        assert high - low < 1.6, "the shared part must cancel"
    # binomial error of 500 trials: 1 point
    least = 0.88 if n == 7 else 0.92
    assert least <= alone / 500 <= 0.98
    assert least <= paired / 500 <= 0.98


def test_coverage_from_halves_of_a_number_biased_by_n():
    """The variance's plug-in estimate: biased by (n - 1) / n, about twice as much in a half."""
    rng = np.random.default_rng(12)
    found = [interval_of(halved(rng.normal(size=40), np.var)) for _ in range(400)]
    expectation = np.mean([interval.value for interval in found])
    assert 0.90 <= np.mean([interval.low <= expectation <= interval.high for interval in found]) <= 0.98


def test_the_level_of_halves_and_their_pairing():
    values = np.random.default_rng(13).normal(size=20)
    wide, narrow = (interval_of(halved(values), level=level, n_resamples=5) for level in (0.95, 0.5))
    # quantiles of Student's t with 19 degrees of freedom
    assert (wide.high - wide.value) / (narrow.high - narrow.value) == pytest.approx(2.0930 / 0.6876, rel=2e-3)
    assert difference_of(halved(values + 1), halved(values))[:3] == pytest.approx((1, 1, 1))
    for other in (halved(values[1:]), halved(values, groups="others")):
        with pytest.raises(ValueError, match="same groups and halves"):
            difference_of(halved(values), other)
    with pytest.raises(ValueError, match=r"one metric, got 'set' and 'other'"):
        difference_of(halved(values), halved(values) | {"metric": "other"})
    with pytest.raises(ValueError, match="level"):
        interval_of(halved(values), level=95)
    none = halved(values) | {"subsets": []}
    assert interval_of(none)[1:] == (None, None)
    assert difference_of(none, none) == (0, None, None, 20)


def test_documents_of_groups_are_bootstrapped():
    values = np.random.default_rng(14).normal(size=20)
    documents = [{"metric": "m", "aggregate": "mean", "groups": valued(v)} for v in (values, values**2)]
    options = {"n_resamples": 300, "cluster": "prompt"}
    assert interval_of(documents[0], **options) == bootstrap_interval(valued(values), **options)
    expected = paired_difference(valued(values), valued(values**2), **options)
    assert difference_of(*documents, **options) == expected
