"""Tests of the paired differences between two methods (`eval.intervals.paired_differences`).

For the meaning of the numbers see docs/metrics.md, "How sure a number is".
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from eval.intervals import FEWEST, Cluster, Difference, GroupValue, cluster_sums, constant, drawn_clusters


def bootstrap_t_p(
    differences: Sequence[GroupValue], n_resamples: int = 10_000, seed: int = 0, cluster: Cluster | None = "category"
) -> float | None:
    """Test whether two methods differ, by a two-sided symmetric bootstrap-t.

    A resample counts if its mean lies at least as many of its own standard errors from the observed mean as the
    observed mean lies from 0. If b of B resamples count, p = (1 + b) / (1 + B) (Davison and Hinkley 1997, Sec. 4.4).
    The standard error of each resample makes the test robust against skewed differences. A resample of equal clusters
    has no standard error and counts.

    Args:
        differences: paired differences, method minus baseline.
        n_resamples, seed, cluster: see `bootstrap_interval`; equal values draw the same clusters.

    Returns:
        p in (0, 1]; None for fewer than four clusters or if all clusters are equal, but 1 if all clusters are 0.
    """
    sums, sizes = cluster_sums(differences, cluster)
    draws = drawn_clusters(len(sums), n_resamples, seed)
    if len(sums) < FEWEST:
        return None
    of_each = sums / sizes
    if constant(of_each):
        return None if of_each.any() else 1.0
    mean, error = _mean_and_error(sums, sizes)
    # distances that differ only by rounding are equal
    rounding = 1e-12 * np.abs(of_each).max()
    count = 0
    for drawn in draws:
        means, errors = _mean_and_error(sums[drawn], sizes[drawn])
        count += int((np.abs(means - mean) >= abs(mean) / error * errors - rounding).sum())
    return (1 + count) / (1 + n_resamples)


def _mean_and_error(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of all values of k clusters, [..., k] -> [...], and its linearised standard error.

    The factor (k / (k - 1))^0.5 of the error is left out, because it cancels in the test.
    """
    total = sizes.sum(-1)
    mean = sums.sum(-1) / total
    residuals = sums - mean[..., None] * sizes
    return mean, np.sqrt((residuals**2).sum(-1)) / total


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of m tests (Holm 1979): the running maximum of (m - rank) p, at most 1.

    If you reject the tests whose adjusted p is below a level, any false rejection in the family has at most that
    probability.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values in [0, 1], got {list(p_values)}; leave out tests that were not made")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()


def effect_size(differences: Sequence[GroupValue], cluster: Cluster | None = "category") -> float | None:
    """Return d_z, the mean of the clusters' mean differences over their standard deviation (Cohen 1988).

    It is None for fewer than two clusters or if all clusters are equal.
    """
    means = _cluster_means(differences, cluster)
    return None if constant(means) else float(means.mean() / means.std(ddof=1))


def win_rate(
    differences: Sequence[GroupValue], higher_is_better: bool = True, cluster: Cluster | None = "category"
) -> float:
    """Return the share of clusters in which the method's mean is better, in [0, 1]; ties count one half."""
    signs = np.sign(_cluster_means(differences, cluster))
    return float((((signs if higher_is_better else -signs) + 1) / 2).mean())


def _cluster_means(differences: Sequence[GroupValue], cluster: Cluster | None) -> np.ndarray:
    sums, sizes = cluster_sums(differences, cluster)
    return sums / sizes


def non_inferior(difference: Difference, margin: float, higher_is_better: bool = True) -> bool | None:
    """Test whether a method is at most `margin` worse than the baseline.

    The whole interval of the difference must lie on the better side of the margin; a 95 % interval makes this a
    one-sided test at 2.5 %. "No significant loss" is a weaker statement, which is always true for few groups.

    Args:
        difference: method minus baseline.
        margin: largest acceptable loss in the metric's unit, > 0, chosen beforehand.
        higher_is_better: direction of the metric.

    Returns:
        The result of the test; None if the interval could not be estimated.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"expected a margin > 0 in the metric's unit, got {margin}; state the loss you would accept")
    if difference.low is None or difference.high is None:
        return None
    return difference.low > -margin if higher_is_better else difference.high < margin


def non_inferiority_power(low: float, high: float, margin: float, level: float = 0.95) -> float:
    """Compute the power of the non-inferiority test when the method loses nothing.

    Assumes a normally distributed estimate whose true value is 0 and whose standard error follows from the width of the
    interval. The test succeeds when the lower confidence limit lies above -margin.

    Args:
        low, high: confidence limits of the paired difference, in the metric's unit.
        margin: largest acceptable loss, > 0, in the metric's unit.
        level: coverage of the interval.

    Returns:
        Power in [0, 1]. A small value means that "not shown" may only mean "too few groups".
    """
    half_width = (high - low) / 2
    if half_width == 0:
        return 1.0
    critical_value = float(ndtri((1 + level) / 2))
    return float(ndtr(critical_value * (margin / half_width - 1)))
