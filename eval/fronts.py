"""Compare methods by gain and loss: gains at equal loss, Pareto fronts, and each method's share of the hypervolume.

A method is a path of S settings from weak to strong. Each has a gain and a loss, [..., S], which are paired differences
to the baseline. Leading axes are resamples, which all methods share, so that comparisons of methods are paired.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.intervals import Cluster, GroupValue, cluster_sums, drawn_clusters


def resampled_means(
    settings: Sequence[Sequence[GroupValue]], n_resamples: int, seed: int, cluster: Cluster | None
) -> np.ndarray:
    """Return the means of several settings' values, [1 + R, S]: first of the values, then of R resamples of clusters.

    Args:
        settings: S lists of paired differences of the same groups; ValueError if the groups differ.
        n_resamples, seed, cluster: see `eval.intervals.bootstrap_interval`.
    """
    pairs = [cluster_sums(sorted(values, key=lambda value: value["group"]), cluster) for values in settings]
    sums, sizes = (np.stack(parts, axis=1) for parts in zip(*pairs, strict=True))  # [k, S]
    if (sizes != sizes[:, :1]).any():
        raise ValueError("expected the same groups of every setting, got others; measure all on the same prompts")
    means = [sums.sum(axis=0, keepdims=True) / sizes.sum(axis=0, keepdims=True)]
    means += [sums[draw].sum(axis=1) / sizes[draw].sum(axis=1) for draw in drawn_clusters(len(sums), n_resamples, seed)]
    return np.concatenate(means)


def best_gain_at_budget(
    gains: np.ndarray, losses: np.ndarray, budget: float, interpolate: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest gain at a loss of at most `budget`, and its position on the path, [..., S] -> [...] each.

    Candidates are the settings within the budget. With `interpolate`, so are the points where the line between a
    setting within the budget and a neighbour outside crosses it: only for methods that change little by little between
    two settings. The path begins at its first setting, not at the baseline. A position of 1.5 lies halfway between the
    second and the third setting. Without a candidate, gain and position are NaN; of equal gains, the first counts.
    """
    within = losses <= budget
    crosses = (within[..., 1:] != within[..., :-1]) & interpolate
    share = (budget - losses[..., :-1]) / np.where(crosses, np.diff(losses, axis=-1), 1.0)
    between = np.where(crosses, gains[..., :-1] + share * np.diff(gains, axis=-1), -np.inf)
    candidates = np.concatenate([np.where(within, gains, -np.inf), between], axis=-1)
    indices = np.arange(gains.shape[-1], dtype=float)
    positions = np.concatenate([np.broadcast_to(indices, gains.shape), indices[:-1] + share], axis=-1)
    best = candidates.argmax(axis=-1)[..., None]
    gain, position = (np.take_along_axis(values, best, axis=-1)[..., 0] for values in (candidates, positions))
    exists = np.isfinite(gain)
    return np.where(exists, gain, np.nan), np.where(exists, position, np.nan)


def on_front(gains: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """Return which of P points lose at most `budget` and are not dominated, bool [..., P].

    A point is dominated by another point, or by the baseline at the origin, that is not worse in gain and in loss and
    better in one of them.
    """
    origin = np.zeros((*gains.shape[:-1], 1))
    others_gain, others_loss = (np.concatenate([values, origin], axis=-1)[..., None, :] for values in (gains, losses))
    gain, loss = gains[..., None], losses[..., None]
    no_worse = (others_gain >= gain) & (others_loss <= loss)
    dominated = (no_worse & ((others_gain > gain) | (others_loss < loss))).any(axis=-1)
    return (losses <= budget) & ~dominated


def hypervolume(gains: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """Return the area that P points dominate at gains above 0 and losses in [0, budget], [..., P] -> [...].

    A negative loss counts as 0.
    """
    order = np.argsort(losses, axis=-1, kind="stable")
    gains, losses = (np.take_along_axis(values, order, axis=-1) for values in (gains, losses))
    losses = np.clip(losses, 0.0, budget)
    best = np.maximum.accumulate(np.maximum(gains, 0.0), axis=-1)
    widths = np.diff(losses, axis=-1, append=np.full((*losses.shape[:-1], 1), budget))
    return (best * widths).sum(axis=-1)


def added_shares(
    gains: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray], budget: float, without: Sequence[str]
) -> np.ndarray:
    """Return the share of all methods' hypervolume that is lost without some of them, [...].

    Args:
        gains, losses: of each method, [..., S].
        budget: largest loss that counts.
        without: names of the methods to leave out.
    """

    def volume(names: Sequence[str]) -> np.ndarray:
        all_gains = np.concatenate([gains[name] for name in names], axis=-1)
        return hypervolume(all_gains, np.concatenate([losses[name] for name in names], axis=-1), budget)

    total = volume(list(gains))
    others = [name for name in gains if name not in without]
    rest = volume(others) if others else np.zeros_like(total)
    lost = np.maximum(total - rest, 0.0)  # rounding could make it negative
    return lost / np.where(total > 0, total, 1.0)
