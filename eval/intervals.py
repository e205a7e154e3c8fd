"""How sure is a number? Bootstrap intervals over groups, alone and paired between two methods.

The unit is the group: its images were made together and are not independent. Two methods that share prompts
and initial noises are compared group by group, in the same resamples, which removes what the prompts have in
common. With `cluster="prompt"` (or "category") clusters are drawn first and then groups within them, which
also says how the number would vary with other prompts.

Limits are percentiles of the resampled numbers, with two corrections. They are centred: value + (percentile -
mean of the resampled numbers). For a mean this changes nothing but the noise of resampling; an entropy,
however, is lower in nearly every resample than in the sample itself (repeated groups show fewer labels), so
that plain percentiles can lie below the value they belong to. And they are widened by sqrt(k / (k - 1)), k
the units of the smallest stratum, since k units drawn from k vary too little by that factor; it matters where
a category has few groups.
In simulations of entropies with 2 to 70 groups a category, intervals of 95 % covered the expectation of the
estimate in 90 to 100 % of the runs; plain percentiles in 0 to 37 % (paired differences: 84 to 97 %). What
remains of an entropy's bias at small n is not in the interval: compare equal n.

An interval needs two units in every stratum that is resampled. Where there is one, nothing is known about
variation, and `low` and `high` are None: not estimable. It does not mean an interval of length 0.

`interval_of` and `difference_of` take a metric's whole document and choose: the bootstrap where it holds
values of groups, or, for a number of a whole set of images, the numbers of random halves of its groups. A half
drawn without replacement varies about the whole as the whole does about its expectation (Politis, Romano and
Wolf, "Subsampling", 1999: the finite-population factor (1 - share) / share is 1 at one half), so that the
standard deviation among halves is the standard error of the whole, and differences between methods come from
the same halves. The bias that a smaller set has (a Frechet distance grows as n falls) is the same in every
half and drops out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from eval.aggregates import Aggregate, CategoryEntropy, GroupValue, Weighted, aggregate_named

Cluster = Literal["prompt", "category"]

#: `aggregate` of documents whose number belongs to a whole set of images; see `eval.metrics.SetMetric`.
SUBSETS = "subsets"

# Numbers of draws [R, G] are held in blocks of at most this many (32 MB), whatever the number of resamples.
_BLOCK = 4_000_000


class Interval(NamedTuple):
    """A value with its interval; `low` and `high` are None where it cannot be estimated."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """The first method's value minus the second's, with its interval, over `n` paired groups."""

    difference: float
    low: float | None
    high: float | None
    n: int


def interval_of(document: Mapping[str, Any], **options: Any) -> Interval:
    """Return the interval of a metric's document, in the way that its aggregate asks for.

    Args:
        document: as `eval.metrics.measure` writes it.
        options: of `bootstrap_interval`. For numbers of whole sets only `level` matters: their halves were drawn
            when they were measured, by groups.

    Returns:
        Value, low, high.
    """
    if document["aggregate"] != SUBSETS:
        return bootstrap_interval(document["groups"], document["aggregate"], **options)
    values = np.array([subset["value"] for subset in document["subsets"]], dtype=float)
    low, high = _around(document["value"], values, document, options.get("level", 0.95))
    return Interval(float(document["value"]), low, high)


def difference_of(document_a: Mapping[str, Any], document_b: Mapping[str, Any], **options: Any) -> Difference:
    """Return by how much one document's number exceeds another's, paired; see `interval_of`.

    Args:
        document_a: of the method.
        document_b: of the baseline: the same metric on the same groups.
        options: of `paired_difference`.

    Returns:
        a - b, low, high, number of paired groups.

    Raises:
        ValueError: two metrics, or groups that only one of them has.
    """
    for key in ("metric", "aggregate"):
        if document_a[key] != document_b[key]:
            raise ValueError(
                f"expected two documents of one {key}, got {document_a[key]!r} and {document_b[key]!r}; "
                "compare a metric with itself"
            )
    if document_a["aggregate"] != SUBSETS:
        return paired_difference(document_a["groups"], document_b["groups"], document_a["aggregate"], **options)
    drawn = [
        (document["groups_sha256"], [(subset["seed"], subset["n_images"]) for subset in document["subsets"]])
        for document in (document_a, document_b)
    ]
    if drawn[0] != drawn[1]:
        raise ValueError(
            f"expected {document_a['metric']} of the same groups and halves in both, got others; run both methods on "
            "the same prompts and seeds and measure again"
        )
    value = document_a["value"] - document_b["value"]
    pairs = zip(document_a["subsets"], document_b["subsets"], strict=True)
    values = np.array([a["value"] - b["value"] for a, b in pairs], dtype=float)
    low, high = _around(value, values, document_a, options.get("level", 0.95))
    return Difference(float(value), low, high, document_a["n_groups"])


def _around(
    value: float, halves: np.ndarray, document: Mapping[str, Any], level: float
) -> tuple[float | None, float | None]:
    """Return the limits around a number of the whole set, from the numbers of halves of it."""
    _check_level(level)
    if len(halves) < 2:
        return None, None
    drawn, whole = document["subsets"][0]["n_groups"], document["n_groups"]
    # 1 for an exact half; an odd number of groups has none
    error = float(halves.std(ddof=1)) * (drawn / (whole - drawn)) ** 0.5
    reach = error * _student(level, len(halves) - 1)
    return float(value) - reach, float(value) + reach


def _student(level: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t by Fisher's expansion, good to 0.002 from 10 degrees on.

    The halves are few, and so the error is not known exactly.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}; 0.95 is usual")


def bootstrap_interval(
    groups: Sequence[GroupValue],
    aggregate: str | Aggregate = "mean",
    n_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    cluster: Cluster | None = None,
) -> Interval:
    """Estimate an aggregate of groups and its bootstrap interval.

    Args:
        groups: one a group, as in a metric's JSON; the order does not matter.
        aggregate: how groups become one number, as named in the JSON. Means resample all groups; category
            entropies resample the groups of each category.
        n_resamples: how many resamples, >= 1.
        seed: of the resampling; equal seeds give equal intervals.
        level: coverage in (0, 1).
        cluster: None resamples groups; "prompt" or "category" resamples those first, then groups in them.

    Returns:
        Value, low, high.
    """
    aggregate = aggregate_named(aggregate)
    groups = _by_id(groups)
    statistic = aggregate.weighted(list(groups.values()))
    value = float(statistic(np.ones((1, len(groups))))[0])
    low, high = _interval(list(groups.values()), aggregate, statistic, value, n_resamples, seed, level, cluster)
    return Interval(value, low, high)


def paired_difference(
    groups_a: Sequence[GroupValue],
    groups_b: Sequence[GroupValue],
    aggregate: str | Aggregate = "mean",
    n_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    cluster: Cluster | None = None,
) -> Difference:
    """Estimate by how much method a exceeds method b, and the interval of that, group by group.

    Both methods get the same resampled groups. Arguments as in `bootstrap_interval`.

    Args:
        groups_a: groups of the method.
        groups_b: groups of the baseline: the same group ids, categories and numbers of images.
        aggregate: see `bootstrap_interval`.
        n_resamples: see `bootstrap_interval`.
        seed: see `bootstrap_interval`.
        level: see `bootstrap_interval`.
        cluster: see `bootstrap_interval`.

    Returns:
        a - b, low, high, number of paired groups.

    Raises:
        ValueError: groups that only one of them has, or that differ; the message lists them.
    """
    aggregate = aggregate_named(aggregate)
    a, b = paired_groups(groups_a, groups_b)
    statistic_a, statistic_b = (aggregate.weighted(side) for side in (a, b))

    def difference(weights: np.ndarray) -> np.ndarray:
        return statistic_a(weights) - statistic_b(weights)

    value = float(difference(np.ones((1, len(a))))[0])
    low, high = _interval(a, aggregate, difference, value, n_resamples, seed, level, cluster)
    return Difference(value, low, high, len(a))


def paired_groups(
    groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue]
) -> tuple[list[GroupValue], list[GroupValue]]:
    """Put the groups of two methods beside each other, in the order of their ids.

    Raises:
        ValueError: groups that only one of them has, or that differ in category or size; the message lists them.
    """
    a, b = _by_id(groups_a), _by_id(groups_b)
    if a.keys() != b.keys():
        raise ValueError(
            f"expected the same groups in both, got {_some(a.keys() - b.keys())} only in the first and "
            f"{_some(b.keys() - a.keys())} only in the second; run both methods on the same prompts and seeds"
        )
    unequal = [key for key in a if any(a[key][field] != b[key][field] for field in ("category", "n_images"))]
    if unequal:
        raise ValueError(
            f"expected the same category and number of images in both, got others in {_some(unequal)}; "
            "run both methods with the same settings"
        )
    return list(a.values()), list(b.values())


def units_of(groups: Sequence[GroupValue], cluster: Cluster | None) -> list[str]:
    """Return for each group the name of what is resampled or exchanged as one: itself, its prompt or category."""
    if cluster not in (None, "prompt", "category"):
        raise ValueError(f"expected cluster to be None, 'prompt' or 'category', got {cluster!r}; choose one")
    if cluster == "prompt":
        return [group["group"].rpartition("/")[0] for group in groups]
    return [group["group" if cluster is None else "category"] for group in groups]


def _by_id(groups: Sequence[GroupValue]) -> dict[str, GroupValue]:
    """Sort by group id, so that a seed gives one interval whatever the order."""
    ordered = {group["group"]: group for group in sorted(groups, key=lambda group: group["group"])}
    if not ordered:
        raise ValueError("expected at least one group, got none; measure a folder with images")
    if len(ordered) != len(groups):
        ids = [group["group"] for group in groups]
        raise ValueError(f"expected every group once, got {_some({i for i in ids if ids.count(i) > 1})} repeatedly")
    return ordered


def _some(ids: Sequence[str] | set[str]) -> str:
    ids = sorted(ids)
    return f"[{', '.join(ids[:10])}{', ...' if len(ids) > 10 else ''}] ({len(ids)})"


def _interval(
    groups: list[GroupValue],
    aggregate: Aggregate,
    statistic: Weighted,
    value: float,
    n_resamples: int,
    seed: int,
    level: float,
    cluster: Cluster | None,
) -> tuple[float | None, float | None]:
    _check_level(level)
    if n_resamples < 1:
        raise ValueError(f"expected n_resamples >= 1, got {n_resamples}; 10000 is usual")
    strata = _strata(groups, aggregate, cluster)
    if any(len(units) < 2 for units in strata):
        return None, None
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(groups))
    sizes = [min(block, n_resamples - start) for start in range(0, n_resamples, block)]
    estimates = np.concatenate([statistic(_draw(rng, strata, size, len(groups))) for size in sizes])
    smallest = min(len(units) for units in strata)
    percentiles = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    low, high = value + np.sqrt(smallest / (smallest - 1)) * (percentiles - estimates.mean())
    # where no resample differs, rounding must not put the value outside
    return min(float(low), value), max(float(high), value)


def _strata(groups: list[GroupValue], aggregate: Aggregate, cluster: Cluster | None) -> list[list[np.ndarray]]:
    """Return for each stratum its units, each the indices of its groups; a unit is one group, or a cluster of
    them."""
    if cluster == "category" and isinstance(aggregate, CategoryEntropy):
        raise ValueError(
            "expected cluster None or 'prompt' for a mean over categories, got 'category'; "
            "its categories are fixed and only what is in them is resampled"
        )
    units = units_of(groups, cluster)
    strata: dict[int, dict[str, list[int]]] = {}
    for index, (stratum, unit) in enumerate(zip(aggregate.strata(groups), units, strict=True)):
        strata.setdefault(int(stratum), {}).setdefault(unit, []).append(index)
    return [[np.array(members) for members in stratum.values()] for stratum in strata.values()]


def _draw(rng: np.random.Generator, strata: list[list[np.ndarray]], n: int, n_groups: int) -> np.ndarray:
    """Draw n resamples: how often each group occurs in each, float64 [n, G]."""
    weights = np.empty((n, n_groups))
    for units in strata:
        k = len(units)
        draws = rng.integers(k, size=(n, k)) + k * np.arange(n)[:, None]
        times = np.bincount(draws.ravel(), minlength=n * k).reshape(n, k)
        if all(len(members) == 1 for members in units):
            weights[:, np.concatenate(units)] = times
            continue
        for unit, members in enumerate(units):
            # A cluster of m groups drawn t times gives t independent samples of m: t m draws among m in all.
            m = len(members)
            weights[:, members] = rng.multinomial(times[:, unit] * m, np.full(m, 1 / m))
    return weights
