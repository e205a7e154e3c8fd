"""Intervals: coverage, pairing, determinism, and what cannot be estimated."""

import numpy as np
import pytest

from eval.intervals import bootstrap_interval, difference_of, entropy, interval_of, n_units


def valued(values, prompts=None, categories=None):
    """Groups with values: one prompt and category each, unless given."""
    prompts = [f"p{index}" for index in range(len(values))] if prompts is None else prompts
    categories = prompts if categories is None else categories
    return [
        {"group": f"{prompt}/{index:06d}", "category": category, "n_images": 4, "value": float(value)}
        for index, (value, prompt, category) in enumerate(zip(values, prompts, categories, strict=True))
    ]


def difference(groups_a, groups_b, **options):
    documents = ({"aggregate": "mean", "groups": groups} for groups in (groups_a, groups_b))
    return difference_of(*documents, **options)


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


def covered(draw, runs, truth=0.0, **options):
    """Return the share of runs whose interval covers the truth; what is not estimable does not."""
    found = [bootstrap_interval(draw(), n_resamples=400, **options) for _ in range(runs)]
    return np.mean([low is not None and low <= truth <= high for _, low, high in found])


def test_mean_is_the_mean_and_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_interval(valued(values))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)


@pytest.mark.parametrize("k", [4, 5, 8, 20])
def test_coverage_of_few_categories(k):
    rng = np.random.default_rng(1)
    # binomial error of 600 trials: 0.9 points; without Student's t it is 0.83 to 0.91 below 20
    assert 0.92 <= covered(lambda: valued(rng.normal(size=k)), 600) <= 0.98
    # the limits follow a skew, but few values do not show it all
    assert (0.90 if k < 20 else 0.92) <= covered(lambda: valued(rng.gamma(4, 0.25, k)), 600, 1) <= 0.98


@pytest.mark.parametrize("shared", [0, 1])
def test_coverage_where_the_prompts_of_a_category_are_alike(shared):
    """20 categories of 7 prompts: nominal whether or not categories differ; by prompt only where they do not."""
    rng = np.random.default_rng(2)
    prompts = [f"c{index // 7}-p{index}" for index in range(140)]
    categories = [f"c{index // 7}" for index in range(140)]

    def draw():
        values = rng.normal(size=(20, 1)) * shared + rng.normal(size=(20, 7))
        return valued(values.ravel(), prompts, categories)

    assert 0.92 <= covered(draw, 400) <= 0.98
    by_prompt = covered(draw, 400, cluster="prompt")
    assert (by_prompt < 0.8) if shared else (0.91 <= by_prompt <= 0.98)


@pytest.mark.parametrize(("categories", "groups"), [(4, 2), (20, 2), (14, 10)])
def test_coverage_of_an_entropy(categories, groups):
    """Of its expectation: what plain percentiles miss nearly always, since resampled groups have a lower entropy."""
    rng = np.random.default_rng(2)
    drawn = [counted(random_counts(rng, groups, categories)) for _ in range(300)]
    found = [bootstrap_interval(groups, "category_entropy", n_resamples=300) for groups in drawn]
    expectation = np.mean([interval.value for interval in found])
    hits = [interval.low is not None and interval.low <= expectation <= interval.high for interval in found]
    # binomial error of 300 trials: 1.3 points; 14 x 10 is near its upper end and so skewed that 3000 trials give 0.92
    assert 0.89 <= np.mean(hits) <= 0.98


def test_paired_difference_is_narrower_on_correlated_values():
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 1, 100)
    a, b = valued(prompts + rng.normal(0.2, 0.1, 100)), valued(prompts + rng.normal(0, 0.1, 100))
    found = difference(a, b)
    assert found.n == 100
    assert found.low <= 0.2 <= found.high
    unpaired = [bootstrap_interval(groups) for groups in (a, b)]
    assert found.difference == pytest.approx(unpaired[0].value - unpaired[1].value)
    assert found.high - found.low < 0.3 * min(interval.high - interval.low for interval in unpaired)


def test_paired_difference_uses_the_same_resamples():
    values = np.random.default_rng(4).normal(size=30)
    found = difference(valued(values + 1 + 1e-6 * values**2), valued(values))
    # whichever groups are drawn, each differs by about 1
    assert found[:3] == pytest.approx((1, 1, 1), abs=1e-5)
    assert found.low < found.difference < found.high


def test_swapping_the_methods_mirrors_the_interval():
    rng = np.random.default_rng(5)
    a, b = valued(rng.normal(size=30)), valued(rng.normal(size=30))
    there, back = difference(a, b), difference(b, a)
    assert there[:3] == pytest.approx((-back.difference, -back.high, -back.low))


@pytest.mark.parametrize("cluster", [None, "prompt", "category"])
def test_deterministic_whatever_the_order(cluster):
    rng = np.random.default_rng(6)
    groups = valued(rng.normal(size=40), prompts=[f"p{index % 8}" for index in range(40)])
    expected = bootstrap_interval(groups, cluster=cluster)
    rng.shuffle(groups)
    assert bootstrap_interval(groups, cluster=cluster) == expected
    assert bootstrap_interval(groups, seed=1, cluster=cluster) != expected
    tables = counted(random_counts(rng, 6, categories=5))
    expected = bootstrap_interval(tables, "category_entropy", cluster=cluster)
    assert bootstrap_interval(tables[::-1], "category_entropy", cluster=cluster) == expected


def test_blocks_do_not_change_the_distribution(monkeypatch):
    groups = valued(np.random.default_rng(7).normal(size=50))
    expected = bootstrap_interval(groups, n_resamples=4000)
    monkeypatch.setattr("eval.intervals.BLOCK", 350)
    assert bootstrap_interval(groups, n_resamples=4000) == pytest.approx(expected, abs=0.02)


def test_clusters_of_unequal_size_agree_with_a_naive_loop():
    rng = np.random.default_rng(9)
    values, prompts = rng.normal(size=24), np.repeat(np.arange(6), [2, 3, 4, 4, 5, 6])
    found = bootstrap_interval(valued(values, prompts=[f"p{prompt}" for prompt in prompts]))
    means = []
    for _ in range(4000):
        drawn = [values[prompts == prompt] for prompt in rng.integers(6, size=6)]
        means.append(np.concatenate(drawn).mean())
    # Student's t with 5 degrees of freedom over the normal quantile
    stretch = (6 / 5) ** 0.5 * 2.5706 / 1.96
    low, high = values.mean() + stretch * (np.quantile(means, [0.025, 0.975]) - np.mean(means))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)


def test_an_entropy_is_a_mean_of_its_categories():
    groups = counted(random_counts(np.random.default_rng(10), 5, categories=6))
    by_hand = []
    for category in (f"c{number}" for number in range(6)):
        members = [group["counts"] for group in groups if group["category"] == category]
        by_hand.append(entropy([sum(counts.get(f"label{label}", 0) for counts in members) for label in range(4)]))
    expected = bootstrap_interval(valued(by_hand))
    for cluster in (None, "prompt", "category"):
        assert bootstrap_interval(groups, "category_entropy", cluster=cluster) == pytest.approx(expected)


def test_entropy_refuses_a_small_category_and_names_it():
    tables = {"plenty": [[40, 0]] * 3, "little": [[3, 1]]}
    with pytest.raises(ValueError, match=r"'little'.*at least \d+ images.*got 4"):
        bootstrap_interval(counted(tables), "category_entropy")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_units_have_a_value_and_no_interval(k):
    values = np.arange(1.0, k + 1)
    assert bootstrap_interval(valued(values)) == (values.mean(), None, None)
    assert difference(valued(2 * values), valued(values)) == (values.mean(), None, None, k)
    groups = valued(np.arange(10.0), [f"p{index % k}" for index in range(10)])
    for cluster in ("prompt", "category"):
        assert bootstrap_interval(groups, cluster=cluster) == (4.5, None, None)
    assert bootstrap_interval(groups, cluster=None).low is not None
    tables = {f"c{index}": [[40, 40], [8, 72]] for index in range(k)}
    assert bootstrap_interval(counted(tables), "category_entropy").low is None


def test_equal_resamples_are_no_certainty():
    assert bootstrap_interval(valued([0.1] * 9)) == (pytest.approx(0.1), None, None)
    # differences that rounding alone tells apart
    a, b = valued([0.3, 0.6, 1.1, 2.3, 5.7]), valued([0.2, 0.5, 1.0, 2.2, 5.6])
    assert difference(a, b) == (pytest.approx(0.1), None, None, 5)
    assert difference(a, a) == (0, None, None, 5)
    one_label = {f"c{index}": [[40, 0]] * 3 for index in range(5)}
    assert bootstrap_interval(counted(one_label), "category_entropy") == (0, None, None)


def test_unpaired_groups_are_listed():
    a = valued([1, 2, 3])
    with pytest.raises(ValueError, match=r"\[p2/000002\] \(1\) only in the first and \[\] \(0\)"):
        difference(a, a[:2])
    with pytest.raises(ValueError, match=r"only in the second"):
        difference(a[:2], a)
    with pytest.raises(ValueError, match=r"number of images.*p1/000001"):
        difference(a, [{**group, "n_images": 3} if "p1" in group["group"] else group for group in a])
    with pytest.raises(ValueError, match=r"every group once.*p0/000000"):
        bootstrap_interval([*a, a[0]])


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (range(9), {"level": 95}, "level"),
        (range(9), {"n_resamples": 0}, "n_resamples"),
        (range(9), {"aggregate": "median"}, "category_entropy.*mean"),
        (range(9), {"cluster": "image"}, "cluster"),
        ([], {}, "at least one group"),
        ([1, np.nan], {}, r"finite.*p1/000001"),
    ],
)
def test_arguments_are_checked(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(valued(values), **arguments)


def halved(values, statistic=np.mean, groups=None):
    """The document of a number of the whole set, with its halves, as a SetMetric writes it: one image a unit."""
    n = len(values)
    halves = [np.random.default_rng(seed).permutation(n)[: n // 2] for seed in range(20)]
    return {
        "metric": "set",
        "aggregate": "subsets",
        "value": float(statistic(values)),
        "n_groups": 2 * n,
        "n_units": n,
        "groups": [],
        "groups_sha256": groups or f"{n} units",
        "subsets": [
            {"seed": seed, "n_units": n // 2, "n_images": n // 2, "value": float(statistic(values[half]))}
            for seed, half in enumerate(halves)
        ],
    }


@pytest.mark.parametrize("n", [6, 7, 20, 60])
def test_coverage_from_halves(n):
    rng = np.random.default_rng(11)
    alone = paired = 0
    for _ in range(500):
        shared, a, b = rng.normal(size=n), rng.normal(1, 0.2, n), rng.normal(0, 0.2, n)
        _, low, high = interval_of(halved(shared))
        alone += low <= 0 <= high
        _, low, high, count = difference_of(halved(shared + a), halved(shared + b))
        paired += low <= 1 <= high
        assert count == 2 * n
        assert high - low < 2, "the shared part must cancel"
    # binomial error of 500 trials: 1 point
    assert 0.92 <= alone / 500 <= 0.98
    assert 0.92 <= paired / 500 <= 0.98


def test_coverage_from_halves_of_a_number_biased_by_n():
    """The variance's plug-in estimate: biased by (n - 1) / n, about twice as much in a half."""
    rng = np.random.default_rng(12)
    found = [interval_of(halved(rng.normal(size=40), np.var)) for _ in range(400)]
    expectation = np.mean([interval.value for interval in found])
    assert 0.90 <= np.mean([interval.low <= expectation <= interval.high for interval in found]) <= 0.98


def test_the_level_of_halves_and_their_pairing():
    values = np.random.default_rng(13).normal(size=20)
    wide, narrow = (interval_of(halved(values), level=level, n_resamples=5) for level in (0.95, 0.5))
    # quantiles of Student's t with 9.5 degrees of freedom: 19 of the halves, 19 of the units
    assert (wide.high - wide.value) / (narrow.high - narrow.value) == pytest.approx(2.2439 / 0.7012, rel=2e-3)
    assert difference_of(halved(values + 1 + 1e-9 * values**2), halved(values))[:3] == pytest.approx((1, 1, 1))
    assert difference_of(halved(values), halved(values)) == (0, None, None, 40), "equal halves are no certainty"
    for other in (halved(values[1:]), halved(values, groups="others")):
        with pytest.raises(ValueError, match="same groups and halves"):
            difference_of(halved(values), other)
    with pytest.raises(ValueError, match="level"):
        interval_of(halved(values), level=95)
    none = halved(values) | {"subsets": []}
    assert interval_of(none)[1:] == (None, None)
    assert difference_of(none, none) == (0, None, None, 40)


@pytest.mark.parametrize(
    ("key", "value"),
    [("metric", "other"), ("version", 2), ("settings", {"q": 3}), ("encoder", {"name": "clip", "id": "clip-new"})],
)
def test_only_one_and_the_same_metric_is_compared(key, value):
    values = np.random.default_rng(13).normal(size=20)
    own = {"metric": "m", "version": 1, "settings": {"q": 1}, "encoder": {"name": "clip", "id": "clip-old"}}
    for document in (halved(values) | own, {"aggregate": "mean", "groups": valued(values)} | own):
        assert difference_of(document, document).difference == 0
        with pytest.raises(ValueError, match=f"one {key}, got .* and .*measure both"):
            difference_of(document, document | {key: value})


def test_intervals_stay_within_the_metrics_bounds():
    values = np.array([0, 0, 0, 0.9, 1, 1, 1, 1.0])
    grouped = {"metric": "m", "aggregate": "mean", "groups": valued(values[3:])}
    free = interval_of(grouped)
    assert free.high > 1
    assert interval_of(grouped | {"bounds": [0, 1]}) == (free.value, free.low, 1)
    assert interval_of(grouped | {"bounds": [None, None]}) == free
    lowest = interval_of(halved(values[:4].repeat(2)) | {"bounds": [0, None]})
    assert lowest.low == 0 < lowest.value < lowest.high
    few = grouped | {"groups": valued([1, 2]), "bounds": [0, 1]}
    assert interval_of(few) == (1.5, None, None)


def test_units_are_what_is_resampled():
    groups = valued(
        np.arange(12.0), [f"p{index // 2}" for index in range(12)], [f"c{index // 4}" for index in range(12)]
    )
    document = {"aggregate": "mean", "groups": groups}
    assert [n_units(document, cluster) for cluster in (None, "prompt", "category")] == [12, 6, 3]
    entropies = {"aggregate": "category_entropy", "groups": counted(random_counts(np.random.default_rng(0), 9))}
    assert [n_units(entropies, cluster) for cluster in (None, "prompt", "category")] == [3, 3, 3]
    assert n_units(halved(np.arange(8.0)), None) == 8


def test_documents_of_groups_are_bootstrapped():
    values = np.random.default_rng(14).normal(size=20)
    documents = [{"metric": "m", "aggregate": "mean", "groups": valued(v)} for v in (values, values**2)]
    options = {"n_resamples": 300, "cluster": "prompt"}
    assert interval_of(documents[0], **options) == bootstrap_interval(valued(values), **options)
    expected = bootstrap_interval(valued(values - values**2), **options)
    assert difference_of(*documents, **options)[:3] == pytest.approx(expected)
