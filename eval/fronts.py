"""Several methods between a gain and what it costs: gains at equal cost, fronts, and what each method adds to them.

A method is a path of settings, from nothing done through the weakest to the strongest. All numbers are of paired
differences to what no method does, [..., S] for S settings: a gain (more is better) and a loss (less is better).
Leading axes are resamples, the same for all methods, so that what is said of two methods is paired, too.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.intervals import Cluster, GroupValue, cluster_sums, drawn_clusters


def resampled_means(
    settings: Sequence[Sequence[GroupValue]], n_resamples: int, seed: int, cluster: Cluster | None
) -> np.ndarray:
    """Return the means of several settings' values, [1 + R, S]: the values themselves, then R resamples of clusters.

    Args:
        settings: S lists of paired differences of the same groups.
        n_resamples, seed, cluster: as of `eval.intervals.bootstrap_interval`.

    Raises:
        ValueError: settings of other clusters than the first one's.
    """
    pairs = [cluster_sums(sorted(values, key=lambda value: value["group"]), cluster) for values in settings]
    sums, sizes = (np.stack(parts, axis=1) for parts in zip(*pairs, strict=True))  # [k, S]
    if (sizes != sizes[:, :1]).any():
        raise ValueError(
            "expected the same groups of every setting, got others: measure all of them on the same prompts"
        )
    drawn = [
        sums[block].sum(axis=1) / sizes[block].sum(axis=1) for block in drawn_clusters(len(sums), n_resamples, seed)
    ]
    return np.concatenate([sums.sum(axis=0, keepdims=True) / sizes.sum(axis=0, keepdims=True), *drawn])


def best_gain_at_budget(gains: np.ndarray, losses: np.ndarray, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the most that a method gains at a loss of at most `loss`, and where on its path, [..., S] -> [...] each.

    Candidates are its settings and, between one that keeps to the loss and a neighbour that does not, the point of the
    line between them where that is lost. Between nothing done and the first setting there is no setting. The place is
    in settings, from 0 for the first to S - 1, and 1.5 halfway between the second and the third; where no candidate
    keeps to the loss, gain and place are NaN.
    """
    within = losses <= loss
    crossed = within[..., 1:] != within[..., :-1]
    share = (loss - losses[..., :-1]) / np.where(crossed, np.diff(losses, axis=-1), 1.0)
    between = np.where(crossed, gains[..., :-1] + share * np.diff(gains, axis=-1), -np.inf)
    candidates = np.concatenate([np.where(within, gains, -np.inf), between], axis=-1)
    numbers = np.arange(gains.shape[-1], dtype=float)
    places = np.concatenate([np.broadcast_to(numbers, gains.shape), numbers[:-1] + share], axis=-1)
    best = candidates.argmax(axis=-1)[..., None]
    gain, place = (np.take_along_axis(values, best, axis=-1)[..., 0] for values in (candidates, places))
    found = np.isfinite(gain)
    return np.where(found, gain, np.nan), np.where(found, place, np.nan)


def on_front(gains: np.ndarray, losses: np.ndarray, most: float) -> np.ndarray:
    """Tell which of P points lose at most `most` and are beaten by no other one, bool [..., P].

    A point is beaten by one that gains as much for less, or more for as much. Nothing done, the origin, is another one.
    """
    nothing = np.zeros((*gains.shape[:-1], 1))
    others_gain, others_loss = (np.concatenate([values, nothing], axis=-1)[..., None, :] for values in (gains, losses))
    gain, lost = gains[..., None], losses[..., None]
    no_worse = (others_gain >= gain) & (others_loss <= lost)
    beaten = (no_worse & ((others_gain > gain) | (others_loss < lost))).any(axis=-1)
    return (losses <= most) & ~beaten


def hypervolume(gains: np.ndarray, losses: np.ndarray, most: float) -> np.ndarray:
    """Return the area that P points dominate, [..., P] -> [...]: of gains above 0, at losses up to `most`.

    A point that loses nothing, or wins, counts as one that loses 0.
    """
    order = np.argsort(losses, axis=-1, kind="stable")
    gains, losses = (np.take_along_axis(values, order, axis=-1) for values in (gains, losses))
    losses = np.clip(losses, 0.0, most)
    best = np.maximum.accumulate(np.maximum(gains, 0.0), axis=-1)
    widths = np.diff(losses, axis=-1, append=np.full((*losses.shape[:-1], 1), most))
    return (best * widths).sum(axis=-1)


def added_shares(
    gains: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray], most: float, without: Sequence[str]
) -> np.ndarray:
    """Return which share of all methods' hypervolume is lost without some of them, [...].

    Args:
        gains, losses: of each method, [..., S].
        most: the largest loss that counts.
        without: the names of those left out.
    """

    def volume(names: Sequence[str]) -> np.ndarray:
        return hypervolume(*(np.concatenate([of[name] for name in names], axis=-1) for of in (gains, losses)), most)

    everything, others = volume(list(gains)), [name for name in gains if name not in without]
    rest = volume(others) if others else np.zeros_like(everything)
    lost = np.maximum(everything - rest, 0.0)  # rounding aside it never is below
    return lost / np.where(everything > 0, everything, 1.0)
