"""Is a difference between two methods more than chance, how large is it, and is quality kept?

All of it on the pairs of a metric's documents: the same group, made by either method from the same noises.

* The sign-flip test asks how often a difference as large as the one found would come about if the method's
  name meant nothing: then the two results of a group might as well be exchanged. Nothing is assumed of the
  values' distribution, and exchanging results works for label counts as well as for values. With few groups all
  2^n exchanges are tried; beyond, B seeded ones, and the p-value is (1 + b) / (1 + B), b the exchanges that
  differ by as much (Phipson and Smyth 2010: never 0, and valid at any B). Groups of one prompt are no
  independent witnesses for other prompts: `cluster="prompt"` exchanges them together.
* Holm's correction keeps the chance of any false finding in a family of tests below the level (Holm 1979).
* d_z is the mean paired difference in units of the differences' standard deviation (Cohen 1988): it does not
  grow with n, as a p-value shrinks.
* "No significant loss of quality" is no evidence of quality kept: few groups show it always. Non-inferiority
  turns the burden round: the loss that the interval still allows must lie within a margin stated beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eval.aggregates import Aggregate, GroupValue, aggregate_named
from eval.intervals import Cluster, Difference, paired_groups, units_of

# Exchanges [B, 2 G] are held in blocks of at most this many numbers (32 MB).
_BLOCK = 4_000_000


def sign_flip_p(
    groups_a: Sequence[GroupValue],
    groups_b: Sequence[GroupValue],
    aggregate: str | Aggregate = "mean",
    n_flips: int = 10_000,
    seed: int = 0,
    cluster: Cluster | None = None,
) -> float:
    """Test whether two methods differ, two-sided, by exchanging their results group by group.

    Args:
        groups_a: groups of the method.
        groups_b: groups of the baseline: the same group ids, categories and numbers of images.
        aggregate: how groups become one number, as named in the documents.
        n_flips: random exchanges, >= 1. Where all of them together are no more than this, all are tried and the
            p-value is exact.
        seed: of the exchanges; equal seeds give equal p-values, whatever the order of the groups.
        cluster: None exchanges each group by itself; "prompt" or "category" all groups of one together.

    Returns:
        The p-value, in (0, 1]. With n units it cannot lie below 2 / 2^n.

    Raises:
        ValueError: groups that only one method has, or that differ; the message lists them.
    """
    if n_flips < 1:
        raise ValueError(f"expected n_flips >= 1, got {n_flips}; 10000 is usual")
    aggregate = aggregate_named(aggregate)
    a, b = paired_groups(groups_a, groups_b)
    # One table of both methods' groups: an exchange is a choice of which rows count for the first.
    statistic = aggregate.weighted([*a, *b])
    names = units_of(a, cluster)
    order = list(dict.fromkeys(names))
    unit = np.array([order.index(name) for name in names])
    k = len(order)

    def differences(flips: np.ndarray) -> np.ndarray:
        exchanged = flips[:, unit].astype(float)
        first, second = np.hstack([1 - exchanged, exchanged]), np.hstack([exchanged, 1 - exchanged])
        return np.abs(statistic(first) - statistic(second))

    found = differences(np.zeros((1, k), dtype=bool))[0]
    exact = k < 60 and 2**k <= n_flips
    total = 2**k if exact else n_flips
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // (2 * len(a)))
    count = 0
    for start in range(0, total, block):
        size = min(block, total - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(k)) & 1 == 1
        else:
            flips = rng.integers(2, size=(size, k), dtype=np.uint8) == 1
        # An exchange that only rounds to another number is as large.
        count += int((differences(flips) >= found - 1e-12 * max(1.0, found)).sum())
    return count / total if exact else (1 + count) / (1 + total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of tests: reject where the adjusted one is below the level.

    Args:
        p_values: of all tests of the family, in [0, 1].

    Returns:
        The adjusted values, in the same order: the running maximum of (m - rank) p, at most 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values in [0, 1], got {list(p_values)}; leave out tests that were not made")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()


def effect_size(groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue]) -> float | None:
    """Return d_z: the mean of the paired differences a - b over their standard deviation.

    Returns:
        The effect, None where it has no meaning: groups without values of their own (label counts), fewer than
        two groups, or differences that are all the same.
    """
    differences = _differences(groups_a, groups_b)
    if differences is None or len(differences) < 2:
        return None
    spread = float(differences.std(ddof=1))
    # Rounding leaves about this much of a standard deviation of 0.
    return None if spread <= 1e-12 * float(np.abs(differences).max()) else float(differences.mean()) / spread


def win_rate(
    groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue], higher_is_better: bool = True
) -> float | None:
    """Return the share of groups in which a is better than b, ties counted as one half.

    Returns:
        In [0, 1]; None for groups without values of their own (label counts).
    """
    differences = _differences(groups_a, groups_b)
    if differences is None:
        return None
    better = np.sign(differences) if higher_is_better else -np.sign(differences)
    return float(((better + 1) / 2).mean())


def non_inferior(difference: Difference, margin: float, higher_is_better: bool = True) -> bool | None:
    """Tell whether a method is at most `margin` worse than the baseline, as surely as the interval says.

    The whole interval must lie on the better side of the margin. A two-sided interval of 95 % makes a one-sided
    test at 2.5 %.

    Args:
        difference: method minus baseline, with its interval.
        margin: the largest loss that counts as quality kept, in the metric's unit, > 0; chosen beforehand.
        higher_is_better: of the metric.

    Returns:
        True or False; None where the interval is not estimable.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"expected a margin > 0 in the metric's unit, got {margin}; state the loss you would accept")
    if difference.low is None or difference.high is None:
        return None
    return difference.low > -margin if higher_is_better else difference.high < margin


def _differences(groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue]) -> np.ndarray | None:
    a, b = paired_groups(groups_a, groups_b)
    if not all("value" in group for group in (*a, *b)):
        return None
    return np.array([x["value"] - y["value"] for x, y in zip(a, b, strict=True)], dtype=float)
