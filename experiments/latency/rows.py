"""Timings become the rows of the table: statistics of steps, whole calls and memory, and what was measured on what."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import quantile_test

from experiments.latency.cases import BOUND, PLAIN, Case
from experiments.latency.clock import Timing, inside_of
from negtome import NegToMeConfig

#: Columns that say what was measured on what.
MEASURED = ["model", "weights", "side", "batch", "steps", "dtype", "compiled", "device", "threads"]
#: Columns that tell the measured configurations apart: a new measurement of one replaces all of its rows.
CONFIGURATION = ["experiment", "part", *MEASURED]
#: A table's case makes the curve over the window and a profile too.
SAME_CASE = {"part": {"window": "table", "profile": "table"}}
#: Of the configuration of a variant that NegToMe is attached in.
SETTINGS = ["matching", "reference", "alpha", "threshold", "cross_attention"]
COLUMNS = [
    *CONFIGURATION, "variant", "t_low", "t_high", "steps_inside", *SETTINGS, "pushed_share",
    "inside_ms", "inside_q1_ms", "inside_q3_ms", "inside_ratio", "inside_ratio_low", "inside_ratio_high",
    "outside_ms", "outside_q1_ms", "outside_q3_ms", "outside_ratio", "outside_ratio_low", "outside_ratio_high",
    "call_s", "call_q1_s", "call_q3_s", "call_ratio", "call_ratio_low", "call_ratio_high", "call_how", "image_s",
    "peak_mib", "peak_ratio", "operation", "operation_calls", "host_ms", "device_ms",
    "rounds", "measured_steps", "measured_inside", "torch", "diffusers", "cuda", "python", "setting", "commit",
]  # fmt: skip
OUT_OF_MEMORY = "out of memory"


def median_interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Return the median of one value a round, and the interval that holds the true median with at least `level`.

    Its ends are values of rounds, which is exact for any distribution, outliers and all, of rounds that are
    independent. NaN where the rounds are too few for an interval, fewer than 6 for 0.95.
    """
    low, high = quantile_test(values, p=0.5).confidence_interval(level)
    return float(np.median(values)), *((np.nan, np.nan) if np.isnan(low + high) else (float(low), float(high)))


def per_round(durations: np.ndarray) -> np.ndarray:
    """Return one duration a round [rounds] of those of steps [rounds, calls, steps]: the mean of its calls' medians."""
    return np.median(durations, axis=2).mean(axis=1)


def compose(timing: Timing, mask: np.ndarray, inside: int, outside: int) -> np.ndarray:
    """Return the seconds [rounds, 1, 1] of calls of `inside` and `outside` steps, from measured ones of maybe fewer.

    A whole call is the measured one, with all that happens in it once, and for every further step in or out of the
    window that call's own median of such steps; of a round's calls, the mean. `mask` tells which steps of a measured
    call are in it.
    """
    seconds = timing.seconds
    for count, part in ((inside, mask), (outside, ~mask)):
        if more := count - part.sum():
            seconds = seconds + more * np.median(timing.steps[:, :, part], axis=2)
    return seconds.mean(axis=1)[:, None, None]


def with_bound(plain: Timing, mask: np.ndarray, bound: float) -> Timing:
    """Return what plain calls would take if each of their steps in the window took the floor's seconds more."""
    added = bound * mask
    return Timing(plain.steps + added, plain.seconds + added.sum())


def rows_of(
    case: Case,
    measured: Sequence[float],
    whole: Sequence[float],
    configs: Mapping[str, NegToMeConfig],
    timings: Mapping[str, Timing],
    level: float,
) -> list[dict[str, Any]]:
    """Return the rows of a case, by variant and window, without the columns of `origin`.

    Args:
        case: what was measured.
        measured, whole: training timesteps of the measured calls, and of those that they stand for.
        configs: settings by variant, with the windows of the measured calls.
        timings: by variant; the floor's too (`with_bound`), none of what did not fit into memory.
        level: of the intervals.
    """
    variants = {variant.name: variant for variant in case.variants}
    masks = {name: inside_of(measured, config.timestep_range) for name, config in configs.items()}
    masks[BOUND] = masks[PLAIN]
    stated = [(case.part, window, variants) for window in case.windows]
    stated += [("window", window, case.curve_variants) for window in case.curve_windows]
    rows = []
    for part, window, names in stated:
        inside = int(inside_of(whole, window).sum())
        for name in (*names, BOUND):
            variant, mask, config = variants.get(name), masks[name], configs.get(name)
            row = {"part": part, "variant": name, "t_low": window[0], "t_high": window[1], "steps_inside": inside}
            row |= measured_steps(case, mask)
            if name not in (PLAIN, BOUND):
                row |= {key: getattr(config, key) for key in SETTINGS}
                row |= {"reference": "given image"} if variant.picture else {}
            rows.append(row)
            if name not in timings:
                row["call_how"] = OUT_OF_MEMORY
                continue
            own, plain = timings[name], timings[PLAIN]
            of_window = variant is None or not variant.outside
            if part != "window":  # which is of whole calls
                row["pushed_share"] = np.median(own.pushed_share)
                row["peak_mib"] = np.median(own.peak) / 2**20
                row["peak_ratio"] = np.nan if name == PLAIN else np.median(own.peak) / np.median(plain.peak)
                for where, steps, told in (("inside", mask, of_window), ("outside", ~mask, name != BOUND)):
                    if told:
                        durations = (1000 * timing.steps[:, :, steps] for timing in (own, plain))
                        row |= _statistics(name, where, "ms", *durations, level)
            if of_window:
                calls = (compose(timings[of], masks[of], inside, len(whole) - inside) for of in (name, PLAIN))
                row |= _statistics(name, "call", "s", *calls, level)
                row["image_s"] = row["call_s"] / case.batch
                as_it_is = measured == whole and inside == mask.sum() and name != BOUND
                row["call_how"] = "measured" if as_it_is else "composed"
    return rows


def measured_steps(case: Case, mask: np.ndarray) -> dict[str, int]:
    """Return the columns that say how much was measured, `mask` being the steps in the window."""
    return {"rounds": case.rounds, "measured_steps": len(mask), "measured_inside": int(mask.sum())}


def _statistics(
    variant: str, what: str, unit: str, own: np.ndarray, plain: np.ndarray, level: float
) -> dict[str, float]:
    """Return a quantity's columns: its quartiles, and the ratios of its rounds to the same without, if it is not that.

    Args:
        own, plain: [rounds, calls, steps], of the variant and without.
    """
    low, middle, high = np.quantile(own, [0.25, 0.5, 0.75])
    row = {f"{what}_{unit}": middle, f"{what}_q1_{unit}": low, f"{what}_q3_{unit}": high}
    if variant != PLAIN:
        row[f"{what}_ratio"], low, high = median_interval(per_round(own) / per_round(plain), level)
        # To every round the floor adds the same: what varies over rounds is not what is uncertain of it.
        row |= {} if variant == BOUND else {f"{what}_ratio_low": low, f"{what}_ratio_high": high}
    return row
