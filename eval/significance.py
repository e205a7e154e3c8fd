"""Is a difference between two methods more than chance, how large is it, and is quality kept?

All of it on `eval.intervals.paired_differences`: the same group, made by either method from the same noises.

What the numbers mean: docs/metrics.md, "How sure a number is".
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from eval.intervals import BLOCK, Cluster, Difference, GroupValue, cluster_sums


def sign_flip_p(
    differences: Sequence[GroupValue], n_flips: int = 10_000, seed: int = 0, cluster: Cluster | None = "category"
) -> float:
    """Test whether two methods differ, two-sided: return a p-value in (0, 1], of k clusters no less than 2 / 2^k.

    How often would a difference as large as the one found come about if the method's name meant nothing? Then the two
    results of a group might as well be exchanged, and its difference has either sign. Nothing is assumed of the values'
    distribution. Where all 2^k exchanges are no more than `n_flips`, all are tried; beyond, B = `n_flips` seeded ones,
    and the p-value is (1 + b) / (1 + B), b those that differ by as much (Phipson and Smyth 2010: never 0, and valid at
    any B).

    Args:
        differences: paired, method minus baseline.
        n_flips: >= 1.
        seed: of the exchanges; equal seeds give equal p-values.
        cluster: what is exchanged together: all groups of a category, since asked for in nearly the same words they are
            no independent witnesses for others; of a prompt; or (None) each group by itself. Where the aggregate is a
            mean of categories, it is categories always.
    """
    if n_flips < 1:
        raise ValueError(f"expected n_flips >= 1, got {n_flips}; 10000 is usual")
    sums, _ = cluster_sums(differences, cluster)
    k, found = len(sums), abs(sums.sum())
    exact = k < 60 and 2**k <= n_flips
    total = 2**k if exact else n_flips
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // k)
    count = 0
    for start in range(0, total, block):
        size = min(block, total - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(k)) & 1 == 1
        else:
            flips = rng.integers(2, size=(size, k), dtype=np.uint8) == 1
        sizes = np.abs((1 - 2.0 * flips) @ sums)
        # An exchange that only rounds to another number is as large.
        count += int((sizes >= found - 1e-12 * np.abs(sums).sum()).sum())
    return count / total if exact else (1 + count) / (1 + total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of all tests of a family (Holm 1979): the running maximum of (m - rank) p, at most 1.

    To reject where the adjusted one is below a level keeps the chance of any false finding in the family below it.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values in [0, 1], got {list(p_values)}; leave out tests that were not made")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()


def effect_size(differences: Sequence[GroupValue]) -> float | None:
    """Return d_z, the mean of paired differences over their standard deviation (Cohen 1988).

    None where it has no meaning: fewer than two differences, or all of them the same.
    """
    values = np.array([pair["value"] for pair in differences], dtype=float)
    if len(values) < 2:
        return None
    spread = float(values.std(ddof=1))
    # Rounding leaves about this much of a standard deviation of 0.
    return None if spread <= 1e-12 * float(np.abs(values).max()) else float(values.mean()) / spread


def win_rate(differences: Sequence[GroupValue], higher_is_better: bool = True) -> float:
    """Return the share of groups (or categories) in which the method is better, ties counted as one half, in [0, 1]."""
    signs = np.sign([pair["value"] for pair in differences])
    return float((((signs if higher_is_better else -signs) + 1) / 2).mean())


def non_inferior(difference: Difference, margin: float, higher_is_better: bool = True) -> bool | None:
    """Tell whether a method is at most `margin` worse than the baseline, as surely as the interval says.

    "No significant loss of quality" is no evidence of quality kept: few groups show it always. Here the interval of the
    difference, method minus baseline, must lie on the better side of the margin as a whole; one of 95 % makes a
    one-sided test at 2.5 %. None where it is not estimable.

    Args:
        margin: the largest loss that counts as quality kept, in the metric's unit, > 0; chosen beforehand.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"expected a margin > 0 in the metric's unit, got {margin}; state the loss you would accept")
    if difference.low is None or difference.high is None:
        return None
    return difference.low > -margin if higher_is_better else difference.high < margin


def non_inferiority_power(low: float, high: float, margin: float, level: float = 0.95) -> float:
    """Return the chance that a method which loses nothing is found to be `non_inferior`, at this many groups.

    Of a difference that is 0 in truth and normal with the error that its interval tells: the interval must reach less
    far below its middle than the margin lies.

    Args:
        low, high: the interval of the difference.
        margin: as of `non_inferior`.
        level: the interval's coverage.

    Returns:
        In [0, 1]: the probability that a "not shown" is no matter of too few groups.
    """
    reach, z = (high - low) / 2, float(ndtri((1 + level) / 2))
    return float(ndtr(z * (margin / reach - 1))) if reach > 0 else 1.0
