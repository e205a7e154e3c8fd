"""Is a difference between two methods more than chance, how large is it, and is quality kept?

All of it on `eval.intervals.paired_differences`: the same group, made by either method from the same noises.

What the numbers mean: docs/metrics.md, "How sure a number is".
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from eval.intervals import FEWEST, Cluster, Difference, GroupValue, cluster_sums, constant, drawn_clusters


def bootstrap_t_p(
    differences: Sequence[GroupValue], n_resamples: int = 10_000, seed: int = 0, cluster: Cluster | None = "category"
) -> float | None:
    """Test whether two methods differ, two-sided, by a symmetric bootstrap-t: return a p-value in (0, 1].

    How often does a resample's mean lie as many of its own standard errors away from the mean found as that lies from
    0? Of B = `n_resamples`, b do, and p is (1 + b) / (1 + B) (Davison and Hinkley 1997, Sec. 4.4). An error of its own
    for every resample is what copes with skewed differences; one of clusters that are all the same has none, and counts
    as that far away.

    None, as with `bootstrap_interval`, of fewer than four clusters, or of clusters that are all the same; but 1 where
    all are 0.

    Args:
        differences: paired, method minus baseline.
        n_resamples, seed, cluster: as of `bootstrap_interval`; equal ones draw the same clusters.
    """
    sums, sizes = cluster_sums(differences, cluster)
    draws = drawn_clusters(len(sums), n_resamples, seed)
    if len(sums) < FEWEST:
        return None
    of_each = sums / sizes
    if constant(of_each):
        return None if of_each.any() else 1.0
    mean, error = _mean_and_error(sums, sizes)
    # Distances that only rounding makes different are the same.
    rounding = 1e-12 * np.abs(of_each).max()
    count = 0
    for drawn in draws:
        means, errors = _mean_and_error(sums[drawn], sizes[drawn])
        count += int((np.abs(means - mean) >= abs(mean) / error * errors - rounding).sum())
    return (1 + count) / (1 + n_resamples)


def _mean_and_error(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of all values of k clusters, [..., k] -> [...], and the linearised standard error of that ratio.

    The error without its factor (k / (k - 1))^0.5, which is the same for all that have k clusters.
    """
    total = sizes.sum(-1)
    mean = sums.sum(-1) / total
    residuals = sums - mean[..., None] * sizes
    return mean, np.sqrt((residuals**2).sum(-1)) / total


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


def effect_size(differences: Sequence[GroupValue], cluster: Cluster | None = "category") -> float | None:
    """Return d_z, the mean of clusters' mean differences over their standard deviation (Cohen 1988).

    None where it has no meaning: fewer than two clusters, or all of them the same.
    """
    means = _cluster_means(differences, cluster)
    return None if constant(means) else float(means.mean() / means.std(ddof=1))


def win_rate(
    differences: Sequence[GroupValue], higher_is_better: bool = True, cluster: Cluster | None = "category"
) -> float:
    """Return the share of clusters in whose mean the method is better, ties counted as one half, in [0, 1]."""
    signs = np.sign(_cluster_means(differences, cluster))
    return float((((signs if higher_is_better else -signs) + 1) / 2).mean())


def _cluster_means(differences: Sequence[GroupValue], cluster: Cluster | None) -> np.ndarray:
    sums, sizes = cluster_sums(differences, cluster)
    return sums / sizes


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
