"""Intervals: coverage, pairing, determinism, and what cannot be estimated."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.intervals import MINIMUM_IMAGES, bootstrap_interval, difference_of, entropy, interval_of, n_units


def slow(*values):
    """Mark the values of a parameter whose tests only `make test-slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def difference(grouped):
    """Return the paired difference of two lists of values or of groups."""

    def of(a, b, **options):
        sides = [side if isinstance(side, list) else grouped(side) for side in (a, b)]
        return difference_of(*({"aggregate": "mean", "groups": groups} for groups in sides), **options)

    return of


@pytest.fixture(scope="module")
def counted(grouped):
    """Return groups with label counts of tables {category: [[counts of a group], ...]}."""
    return lambda tables: grouped(
        [row for table in tables.values() for row in table],
        [category for category, table in tables.items() for _ in table],
    )


def random_counts(rng, groups, categories=3, labels=4, images=4):
    return {
        f"c{number}": np.stack([rng.multinomial(images, rng.dirichlet(np.ones(labels))) for _ in range(groups)])
        for number in range(categories)
    }


# --- entropies -------------------------------------------------------------------------------------------------------


def test_known_entropies():
    for counts, plug_in, n_labels in (
        ([8, 0, 0], 0.0, 1),
        ([5, 5, 5, 5, 0], math.log(4), 4),
        ([6, 3, 3], 1.5 * math.log(2), 3),
    ):
        assert entropy(counts, miller_madow=False) == pytest.approx(plug_in)
        assert entropy(counts) == pytest.approx(plug_in + (n_labels - 1) / (2 * sum(counts)))


def test_miller_madow_removes_most_of_the_bias_and_few_images_are_refused():
    counts = np.random.default_rng(0).multinomial(40, np.full(8, 1 / 8), size=1000)
    plug_in = math.log(8) - np.mean([entropy(row, miller_madow=False) for row in counts])
    corrected = math.log(8) - np.mean([entropy(row) for row in counts])
    assert plug_in > 0.07 and abs(corrected) < 0.2 * plug_in
    assert entropy([MINIMUM_IMAGES, 0]) == 0
    with pytest.raises(ValueError, match=f"at least {MINIMUM_IMAGES} images.*got {MINIMUM_IMAGES - 1}"):
        entropy([MINIMUM_IMAGES - 1, 0])


def test_an_entropy_is_a_mean_of_its_categories(grouped, counted):
    tables = random_counts(np.random.default_rng(10), 5, categories=6)
    expected = bootstrap_interval(grouped([entropy(table.sum(axis=0)) for table in tables.values()]))
    for cluster in (None, "prompt", "category"):
        assert bootstrap_interval(counted(tables), "category_entropy", cluster=cluster) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"'little'.*at least \d+ images.*got 4"):
        bootstrap_interval(counted({"plenty": [[40, 0]] * 3, "little": [[3, 1]]}), "category_entropy")


# --- simulated coverage ----------------------------------------------------------------------------------------------


def covered(draw, runs, truth=0.0, **options):
    """Return the share of runs whose interval covers the truth; an interval that is None does not."""
    intervals = [bootstrap_interval(draw(), n_resamples=200, **options) for _ in range(runs)]
    return np.mean([low is not None and low <= truth <= high for _, low, high in intervals])


@pytest.mark.parametrize("k", [5, *slow(4, 8, 20)])
def test_coverage_of_few_categories(k, grouped):
    rng = np.random.default_rng(1)
    # binomial error of 600 trials: 0.9 points; without Student's t it is 0.83 to 0.91 below 20
    assert 0.92 <= covered(lambda: grouped(rng.normal(size=k)), 600) <= 0.98
    # the limits follow a skew, but few values do not show all of it
    assert 0.90 <= covered(lambda: grouped(rng.gamma(4, 0.25, k)), 600, 1) <= 0.98


@pytest.mark.parametrize("shared", [1, *slow(0)])
def test_coverage_where_the_prompts_of_a_category_are_alike(shared, grouped):
    """20 categories of 7 prompts: nominal by category; by prompt only if the categories do not differ."""
    rng = np.random.default_rng(2)
    prompts = [f"c{index // 7}-p{index}" for index in range(140)]
    categories = [f"c{index // 7}" for index in range(140)]

    def draw():
        values = rng.normal(size=(20, 1)) * shared + rng.normal(size=(20, 7))
        return grouped(values.ravel(), prompts, categories)

    assert 0.91 <= covered(draw, 200) <= 0.985
    by_prompt = covered(draw, 200, cluster="prompt")
    assert (by_prompt < 0.8) if shared else (0.91 <= by_prompt <= 0.985)


@pytest.mark.parametrize("shape", [(4, 2), *slow((20, 2), (14, 10))])
def test_coverage_of_an_entropy(shape, counted):
    """Percentiles of resampled groups would nearly always miss the expectation, because their entropy is lower."""
    rng, (categories, groups) = np.random.default_rng(2), shape
    draws = [counted(random_counts(rng, groups, categories)) for _ in range(300)]
    intervals = [bootstrap_interval(draw, "category_entropy", n_resamples=300) for draw in draws]
    expectation = np.mean([interval.value for interval in intervals])
    hits = [interval.low is not None and interval.low <= expectation <= interval.high for interval in intervals]
    # binomial error of 300 trials: 1.3 points; 14 x 10 is so skewed that 3000 trials give 0.92
    assert 0.89 <= np.mean(hits) <= 0.98


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_clusters_of_unequal_size_agree_with_a_naive_loop(grouped):
    rng = np.random.default_rng(9)
    values, prompts = rng.normal(size=24), np.repeat(np.arange(6), [2, 3, 4, 4, 5, 6])
    interval = bootstrap_interval(grouped(values, [f"p{prompt}" for prompt in prompts]))
    means = []
    for _ in range(2000):
        draw = [values[prompts == prompt] for prompt in rng.integers(6, size=6)]
        means.append(np.concatenate(draw).mean())
    # Student's t with 5 degrees of freedom over the normal quantile
    stretch = (6 / 5) ** 0.5 * 2.5706 / 1.96
    low, high = values.mean() + stretch * (np.quantile(means, [0.025, 0.975]) - np.mean(means))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.05)


def test_a_paired_difference_is_narrow_and_mirrored(difference, grouped):
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 1, 100)
    a, b = prompts + rng.normal(0.2, 0.1, 100), prompts + rng.normal(0, 0.1, 100)
    paired, mirrored = difference(a, b), difference(b, a)
    assert paired.n == 100 and paired.low <= 0.2 <= paired.high
    assert paired[:3] == pytest.approx((-mirrored.difference, -mirrored.high, -mirrored.low))
    unpaired = [bootstrap_interval(grouped(side)) for side in (a, b)]
    assert paired.difference == pytest.approx(unpaired[0].value - unpaired[1].value)
    assert paired.high - paired.low < 0.3 * min(interval.high - interval.low for interval in unpaired)
    # each group differs by about 1, whichever are drawn
    same_draws = difference(prompts + 1 + 1e-6 * prompts**2, prompts)
    assert same_draws[:3] == pytest.approx((1, 1, 1), abs=1e-5) and same_draws.low < same_draws.high


@pytest.mark.parametrize("cluster", [None, "prompt"])
def test_intervals_are_deterministic_whatever_the_order(cluster, grouped, counted):
    rng = np.random.default_rng(6)
    groups = grouped(rng.normal(size=40), [f"p{index % 8}" for index in range(40)])
    expected = bootstrap_interval(groups, cluster=cluster)
    rng.shuffle(groups)
    assert bootstrap_interval(groups, cluster=cluster) == expected
    assert bootstrap_interval(groups, seed=1, cluster=cluster) != expected
    tables = counted(random_counts(rng, 6, categories=5))
    expected = bootstrap_interval(tables, "category_entropy", cluster=cluster)
    assert bootstrap_interval(tables[::-1], "category_entropy", cluster=cluster) == expected


def test_many_values_have_the_normal_interval_in_blocks_too(monkeypatch, grouped):
    values = np.random.default_rng(0).normal(3, 2, 400)
    half_width = 1.96 * values.std(ddof=1) / 20
    limits = (values.mean() - half_width, values.mean() + half_width)
    for block in (1 << 20, 3500):
        monkeypatch.setattr("eval.intervals.BLOCK", block)
        value, *interval = bootstrap_interval(grouped(values), n_resamples=4000)
        assert value == pytest.approx(values.mean()) and interval == pytest.approx(limits, abs=0.1 * half_width)


@pytest.mark.parametrize(("value", "k"), [(0, 20), (1, 20), (0, 4), (0, 3), (1, 1)])
def test_a_rate_of_0_or_1_has_the_exact_limits_of_its_clusters(value, k, grouped):
    """A cluster counts once, however many groups it has: they are not independent."""
    groups = grouped([value] * 2 * k, [f"c{index % k}" for index in range(2 * k)])
    document = {"value": value, "aggregate": "mean", "groups": groups, "bounds": [0.0, 1.0]}
    exact = binomtest(value * k, k).proportion_ci(0.9, method="exact")
    expected = [exact.low, exact.high] if k >= 4 else [None, None]
    assert list(interval_of(document, n_resamples=100, level=0.9)) == pytest.approx([value, *expected])
    assert interval_of(document | {"bounds": [0.0, None]}, n_resamples=100)[1:] == (None, None), "no rate"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_clusters_have_a_value_and_no_interval(k, grouped, counted, difference):
    values = np.arange(1.0, k + 1)
    assert bootstrap_interval(grouped(values)) == (values.mean(), None, None)
    assert difference(2 * values, values) == (values.mean(), None, None, k)
    groups = grouped(np.arange(10.0), [f"p{index % k}" for index in range(10)])
    for cluster in ("prompt", "category"):
        assert bootstrap_interval(groups, cluster=cluster) == (4.5, None, None)
    assert bootstrap_interval(groups, cluster=None).low is not None
    tables = {f"c{index}": [[40, 40], [8, 72]] for index in range(k)}
    assert bootstrap_interval(counted(tables), "category_entropy").low is None


def test_equal_resamples_are_no_certainty(grouped, counted, difference):
    assert bootstrap_interval(grouped([0.1] * 9)) == (pytest.approx(0.1), None, None)
    # the differences are equal except for rounding
    a, b = np.array([0.3, 0.6, 1.1, 2.3, 5.7]), np.array([0.2, 0.5, 1.0, 2.2, 5.6])
    assert difference(a, b) == (pytest.approx(0.1), None, None, 5)
    assert difference(a, a) == (0, None, None, 5)
    one_label = {f"c{index}": [[40, 0]] * 3 for index in range(5)}
    assert bootstrap_interval(counted(one_label), "category_entropy") == (0, None, None)


def test_unpaired_groups_are_listed(grouped, difference):
    a = grouped([1, 2, 3])
    with pytest.raises(ValueError, match=r"\[p002/000002\] \(1\) only in the first and \[\] \(0\)"):
        difference(a, a[:2])
    with pytest.raises(ValueError, match=r"only in the second"):
        difference(a[:2], a)
    with pytest.raises(ValueError, match=r"number of images.*p001/000001"):
        difference(a, [{**group, "n_images": 3} if "p001" in group["group"] else group for group in a])
    with pytest.raises(ValueError, match=r"every group once.*p000/000000"):
        bootstrap_interval([*a, a[0]])


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (range(9), {"level": 95}, "level"),
        (range(9), {"n_resamples": 0}, "n_resamples"),
        (range(9), {"aggregate": "median"}, "category_entropy.*mean"),
        (range(9), {"cluster": "image"}, "cluster"),
        ([], {}, "at least one group"),
        ([1, np.nan], {}, r"finite.*p001/000001"),
    ],
)
def test_arguments_are_checked(values, arguments, message, grouped):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(grouped(values), **arguments)


# --- halves of a set -------------------------------------------------------------------------------------------------


def halved(values, statistic=np.mean, groups=None):
    """Return the document of a number of a set, as a SetMetric writes it, where every image is a cluster."""
    n = len(values)
    halves = [np.random.default_rng(seed).permutation(n)[: n // 2] for seed in range(20)]
    return {
        "metric": "set", "aggregate": "subsets", "value": float(statistic(values)), "n_groups": 2 * n, "n_units": n,
        "groups": [], "groups_sha256": groups or f"{n} images",
        "subsets": [
            {"seed": seed, "n_units": n // 2, "n_images": n // 2, "value": float(statistic(values[half]))}
            for seed, half in enumerate(halves)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("n", [7, *slow(6, 20, 60)])
def test_coverage_from_halves(n):
    rng = np.random.default_rng(11)
    alone = paired = 0
    for _ in range(300):
        shared, a, b = rng.normal(size=n), rng.normal(1, 0.2, n), rng.normal(0, 0.2, n)
        _, low, high = interval_of(halved(shared))
        alone += low <= 0 <= high
        _, low, high, count = difference_of(halved(shared + a), halved(shared + b))
        paired += low <= 1 <= high
        assert count == 2 * n and high - low < 2, "the shared part must cancel"
    # binomial error of 300 trials: 1.3 points
    assert 0.91 <= alone / 300 <= 0.985 and 0.91 <= paired / 300 <= 0.985


@pytest.mark.slow
def test_coverage_from_halves_of_a_number_biased_by_n():
    """The plug-in variance is biased by (n - 1) / n, about twice as much in a half."""
    rng = np.random.default_rng(12)
    intervals = [interval_of(halved(rng.normal(size=40), np.var)) for _ in range(400)]
    expectation = np.mean([interval.value for interval in intervals])
    assert 0.90 <= np.mean([interval.low <= expectation <= interval.high for interval in intervals]) <= 0.98


def test_the_level_of_halves_and_their_pairing():
    values = np.random.default_rng(13).normal(size=20)
    wide, narrow = (interval_of(halved(values), level=level, n_resamples=5) for level in (0.95, 0.5))
    # quantiles of Student's t with 9.5 degrees of freedom: 19 of the halves, 19 of the clusters
    assert (wide.high - wide.value) / (narrow.high - narrow.value) == pytest.approx(2.2439 / 0.7012, rel=2e-3)
    assert difference_of(halved(values + 1 + 1e-9 * values**2), halved(values))[:3] == pytest.approx((1, 1, 1))
    assert difference_of(halved(values), halved(values)) == (0, None, None, 40), "equal halves are no certainty"
    for other in (halved(values[1:]), halved(values, groups="others")):
        with pytest.raises(ValueError, match="same groups and halves"):
            difference_of(halved(values), other)
    with pytest.raises(ValueError, match="level"):
        interval_of(halved(values), level=95)
    none = halved(values) | {"subsets": []}
    assert interval_of(none)[1:] == (None, None) and difference_of(none, none) == (0, None, None, 40)


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("metric", "other"), ("version", 2), ("settings", {"q": 3}), ("encoder", {"name": "clip", "id": "clip-new"})],
)
def test_only_documents_of_one_metric_are_compared(key, value, grouped):
    values = np.random.default_rng(13).normal(size=20)
    identity = {"metric": "m", "version": 1, "settings": {"q": 1}, "encoder": {"name": "clip", "id": "clip-old"}}
    for document in (halved(values) | identity, {"aggregate": "mean", "groups": grouped(values)} | identity):
        assert difference_of(document, document).difference == 0
        with pytest.raises(ValueError, match=f"one {key}, got .* and .*measure both"):
            difference_of(document, document | {key: value})


def test_documents_are_bootstrapped_within_their_bounds(grouped):
    values = np.random.default_rng(14).normal(size=20)
    documents = [{"metric": "m", "aggregate": "mean", "groups": grouped(v)} for v in (values, values**2)]
    options = {"n_resamples": 300, "cluster": "prompt"}
    assert interval_of(documents[0], **options) == bootstrap_interval(grouped(values), **options)
    expected = bootstrap_interval(grouped(values - values**2), **options)
    assert difference_of(*documents, **options)[:3] == pytest.approx(expected)
    document = documents[0] | {"groups": grouped([0.9, 1, 1, 1, 1.0])}
    unbounded = interval_of(document)
    assert unbounded.high > 1 and interval_of(document | {"bounds": [None, None]}) == unbounded
    assert interval_of(document | {"bounds": [0, 1]}) == (unbounded.value, unbounded.low, 1)
    lowest = interval_of(halved(np.array([0, 0, 0, 0.9]).repeat(2)) | {"bounds": [0, None]})
    assert lowest.low == 0 < lowest.value < lowest.high


def test_clusters_are_counted(grouped, counted):
    prompts, categories = [f"p{index // 2}" for index in range(12)], [f"c{index // 4}" for index in range(12)]
    document = {"aggregate": "mean", "groups": grouped(np.arange(12.0), prompts, categories)}
    assert [n_units(document, cluster) for cluster in (None, "prompt", "category")] == [12, 6, 3]
    entropies = {"aggregate": "category_entropy", "groups": counted(random_counts(np.random.default_rng(0), 9))}
    assert [n_units(entropies, cluster) for cluster in (None, "prompt", "category")] == [3, 3, 3]
    assert n_units(halved(np.arange(8.0)), None) == 8
