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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from eval.aggregates import Aggregate, CategoryEntropy, GroupValue, Weighted, aggregate_named

Cluster = Literal["prompt", "category"]

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
    statistic_a, statistic_b = (aggregate.weighted(list(side.values())) for side in (a, b))

    def difference(weights: np.ndarray) -> np.ndarray:
        return statistic_a(weights) - statistic_b(weights)

    value = float(difference(np.ones((1, len(a))))[0])
    low, high = _interval(list(a.values()), aggregate, difference, value, n_resamples, seed, level, cluster)
    return Difference(value, low, high, len(a))


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
    if n_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected n_resamples >= 1 and a level in (0, 1), got {n_resamples} and {level}; 10000 and 0.95 are usual"
        )
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
    if cluster not in (None, "prompt", "category"):
        raise ValueError(f"expected cluster to be None, 'prompt' or 'category', got {cluster!r}; choose one")
    if cluster == "category" and isinstance(aggregate, CategoryEntropy):
        raise ValueError(
            "expected cluster None or 'prompt' for a mean over categories, got 'category'; "
            "its categories are fixed and only what is in them is resampled"
        )
    if cluster is None:
        units = [group["group"] for group in groups]
    elif cluster == "prompt":
        units = [group["group"].rpartition("/")[0] for group in groups]
    else:
        units = [group["category"] for group in groups]
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
