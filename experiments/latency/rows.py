"""The rows of the table from timings: statistics of steps, whole calls and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import quantile_test

from experiments.latency.cases import BOUND, PLAIN, Case
from experiments.latency.clock import Timing, inside_of
from negtome import NegToMeConfig

#: Columns of the model, call and device.
MEASURED = ["model", "weights", "side", "batch", "steps", "dtype", "compiled", "device", "threads"]
#: Columns of a measured configuration: a new measurement replaces all of its rows.
CONFIGURATION = ["experiment", "part", *MEASURED]
#: A case of the table also makes the curve over the timestep range and the profile.
SAME_CASE = {"part": {"window": "table", "profile": "table"}}
#: Columns of a variant's configuration.
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

    Its ends are values of rounds, which is exact for independent rounds of any distribution. They are NaN where the
    rounds are too few for an interval, fewer than 6 for 0.95.
    """
    low, high = quantile_test(values, p=0.5).confidence_interval(level)
    return float(np.median(values)), *((np.nan, np.nan) if np.isnan(low + high) else (float(low), float(high)))


def per_round(durations: np.ndarray) -> np.ndarray:
    """Return one duration a round [rounds] from steps [rounds, calls, steps]: the mean of the calls' medians."""
    return np.median(durations, axis=2).mean(axis=1)


def compose(timing: Timing, mask: np.ndarray, inside: int, outside: int) -> np.ndarray:
    """Return the seconds [rounds, 1, 1] of calls with `inside` and `outside` steps, composed from measured calls.

    A composed call is the measured one plus, for every further step, that call's median of steps in or out of the
    timestep range, which `mask` marks. A round has the mean of its calls.
    """
    seconds = timing.seconds
    for count, part in ((inside, mask), (outside, ~mask)):
        if more := count - part.sum():
            seconds = seconds + more * np.median(timing.steps[:, :, part], axis=2)
    return seconds.mean(axis=1)[:, None, None]


def with_bound(baseline: Timing, mask: np.ndarray, bound: float) -> Timing:
    """Return the baseline's timing with `bound` seconds added to each step in the timestep range."""
    added = bound * mask
    return Timing(baseline.steps + added, baseline.seconds + added.sum())


def rows_of(
    case: Case,
    measured: Sequence[float],
    of_call: Sequence[float],
    configs: Mapping[str, NegToMeConfig],
    timings: Mapping[str, Timing],
    level: float,
) -> list[dict[str, Any]]:
    """Return the rows of a case, by variant and timestep range, without the columns of `origin`.

    Args:
        case: what was measured.
        measured, of_call: training timesteps of the measured calls, and of the calls that they stand for.
        configs: settings by variant, with the timestep ranges of the measured calls.
        timings: by variant, with the lower bound (`with_bound`) and without variants that did not fit into memory.
        level: of the intervals.
    """
    variants = {variant.name: variant for variant in case.variants}
    masks = {name: inside_of(measured, config.timestep_range) for name, config in configs.items()}
    masks[BOUND] = masks[PLAIN]
    stated = [(case.part, window, [*variants, BOUND]) for window in case.windows]
    stated += [("window", window, [*case.curve_variants, BOUND]) for window in case.curve_windows]
    rows = []
    for part, window, names in stated:
        inside = int(inside_of(of_call, window).sum())
        for name in names:
            mask = masks[name]
            row = {"part": part, "variant": name, "t_low": window[0], "t_high": window[1], "steps_inside": inside}
            row |= measured_steps(case, mask)
            if name not in (PLAIN, BOUND):
                row |= {key: getattr(configs[name], key) for key in SETTINGS}
                row |= {"reference": "given image"} if variants[name].picture else {}
            rows.append(row)
            if name not in timings:
                row["call_how"] = OUT_OF_MEMORY
                continue
            timing, baseline = timings[name], timings[PLAIN]
            in_window = name == BOUND or not variants[name].outside
            if part != "window":  # whose rows are of whole calls
                row |= _memory(name, timing, baseline)
                if in_window:
                    row |= _steps(name, "inside", timing, baseline, mask, level)
                if name != BOUND:
                    row |= _steps(name, "outside", timing, baseline, ~mask, level)
            if in_window:
                calls = (compose(timings[of], masks[of], inside, len(of_call) - inside) for of in (name, PLAIN))
                row |= _statistics(name, "call", "s", *calls, level)
                row["image_s"] = row["call_s"] / case.batch
                as_measured = measured == of_call and inside == mask.sum() and name != BOUND
                row["call_how"] = "measured" if as_measured else "composed"
    return rows


def measured_steps(case: Case, mask: np.ndarray) -> dict[str, int]:
    """Return the columns of how much was measured, `mask` being the steps in the timestep range."""
    return {"rounds": case.rounds, "measured_steps": len(mask), "measured_inside": int(mask.sum())}


def _memory(variant: str, timing: Timing, baseline: Timing) -> dict[str, float]:
    peak = np.median(timing.peak)
    ratio = np.nan if variant == PLAIN else peak / np.median(baseline.peak)
    return {"pushed_share": np.median(timing.pushed_share), "peak_mib": peak / 2**20, "peak_ratio": ratio}


def _steps(
    variant: str, quantity: str, timing: Timing, baseline: Timing, mask: np.ndarray, level: float
) -> dict[str, float]:
    durations = (1000 * one.steps[:, :, mask] for one in (timing, baseline))
    return _statistics(variant, quantity, "ms", *durations, level)


def _statistics(
    variant: str, quantity: str, unit: str, durations: np.ndarray, baseline: np.ndarray, level: float
) -> dict[str, float]:
    """Return a quantity's columns: its quartiles and, but for the baseline, the ratio of its rounds to the baseline's.

    Args:
        durations, baseline: [rounds, calls, steps].
    """
    low, middle, high = np.quantile(durations, [0.25, 0.5, 0.75])
    row = {f"{quantity}_{unit}": middle, f"{quantity}_q1_{unit}": low, f"{quantity}_q3_{unit}": high}
    if variant == PLAIN:
        return row
    row[f"{quantity}_ratio"], low, high = median_interval(per_round(durations) / per_round(baseline), level)
    # The lower bound adds the same to every round, so that the spread over rounds is not its uncertainty.
    return row if variant == BOUND else row | {f"{quantity}_ratio_low": low, f"{quantity}_ratio_high": high}
