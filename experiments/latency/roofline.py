"""Predict what NegToMe costs at full size, from shapes alone: a roofline, without weights and without a GPU.

    python -m experiments roofline                        into the configured results folder
    python -m experiments roofline results=results        into the published results

The time of an operation is max(FLOPs / peak, bytes / bandwidth) of a device. Launches, Python and caches are left out:
the times are predictions, not measurements. `<results>/roofline/table.csv` and `table.md` hold them.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from eval.files import write_text
from experiments.latency.cases import Case, composed, configured_cases
from experiments.latency.operations import GATHERS, PROJECTIONS, Operation, Push, record_step
from experiments.latency.random_weights import build_pipeline
from experiments.runs.gpus import DEVICES, Device
from experiments.tables.columns import csv_text, markdown, printed, read_csv
from experiments.tables.paths import result_file

#: Images in a call. A single one is pushed from a reference image, several from the first.
IMAGES = (1, 4)
#: How many hook points in a row use the match of the first; see `experiments.methods.approximate_match`.
REUSES = (2, 4)
#: Parts of a push by its operations; the others are `OTHER`.
PARTS = {"bmm": "product", "max": "arg max", **dict.fromkeys(GATHERS, "gather"), "lerp": "push", "cat": "join"}
OTHER = "other passes"
BASE, ROW, PUSH, HOOK_POINTS = "base step", "row of the reference", "NegToMe", "hook points"
BOUND, NAIVE = "lower bound", "naive, released matching"
REUSED = {reuse: f"one match for {reuse} hook points" for reuse in REUSES}
PROJECTED = {width: f"matched in {width} channels" for width in PROJECTIONS}
APPROXIMATIONS = [*REUSED.values(), *PROJECTED.values()]
#: What a row is about.
KEY = ["model", "side", "images", "dtype", "device"]
#: What the operations of a part need; share: of the base step's ms.
WORK = ["operations", "gflop", "gbyte", "ms", "share"]
#: sites: hook points whose operations are added up; tokens and channels: of each, in rows of one kind of hook point.
COLUMNS = [*KEY, "part", "tokens", "channels", "sites", *WORK]


def least_ms(operations: Iterable[Operation], device: Device) -> float:
    """Add up the least times of operations on a device."""
    peaks = 1e9 * device.teraflops, 1e9 * device.terabytes  # a millisecond
    return sum(max(operation.flops / peaks[0], operation.bytes / peaks[1]) for operation in operations)


def variants(pushes: Sequence[Push]) -> dict[str, list[Operation]]:
    """Return the operations that the pushes add to a step: NegToMe's, by part and together, and those of alternatives.

    Only hook points of the same shape share a match.
    """

    def add_up(operations: Iterable[Sequence[Operation]]) -> list[Operation]:
        return [*itertools.chain.from_iterable(operations)]

    push = add_up(push.matching + push.moving for push in pushes)
    parts = {name: [one for one in push if PARTS.get(one.name, OTHER) == name] for name in (*PARTS.values(), OTHER)}
    parts[PUSH] = push
    parts[BOUND] = add_up(push.lower_bound for push in pushes)
    parts[NAIVE] = add_up(push.naive for push in pushes)
    moving = add_up(push.moving for push in pushes)
    runs = [[*run] for _, run in itertools.groupby(pushes, key=lambda push: (push.tokens, push.channels))]
    for reuse in REUSES:
        parts[REUSED[reuse]] = add_up(push.matching for run in runs for push in run[::reuse]) + moving
    for number, width in enumerate(PROJECTIONS):
        parts[PROJECTED[width]] = add_up(push.projected[number] for push in pushes) + moving
    return {name: operations for name, operations in parts.items() if operations}


def rows_of_case(case: Case, pipe: Any, spec: DictConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case of the latency suite for every number of `IMAGES` and every device."""
    for images in IMAGES:
        baseline = record_step(pipe, spec, None, case.side, images).denoiser
        extended, pushes = record_step(pipe, spec, case.strengths, case.side, images)
        for device in DEVICES:
            key = dict(zip(KEY, (case.model.name, case.side, images, case.model.dtype, device.name), strict=True))
            base_ms = least_ms(baseline, device)
            base, with_row = (_row(BASE, operations, device, base_ms) for operations in (baseline, extended))
            yield key | base
            if images == 1:
                yield key | {"part": ROW} | {name: with_row[name] - base[name] for name in WORK}
            for part, operations in variants(pushes).items():
                yield key | _row(part, operations, device, base_ms) | {"sites": len(pushes)}
            for push, count in Counter(pushes).items():
                row = _row(HOOK_POINTS, (push.matching + push.moving) * count, device, base_ms)
                yield key | row | {"tokens": push.tokens, "channels": push.channels, "sites": count}


def _row(part: str, operations: Sequence[Operation], device: Device, base_ms: float) -> dict[str, Any]:
    """Make the columns of a part of a step; `base_ms` is the time of the baseline's."""
    gflop, gbyte = (sum(getattr(one, name) for one in operations) / 1e9 for name in ("flops", "bytes"))
    ms = least_ms(operations, device)
    return {"part": part, **dict(zip(WORK, (len(operations), gflop, gbyte, ms, ms / base_ms), strict=True))}


def render(frame: pd.DataFrame) -> str:
    """Write the page of the table."""
    summed, hook_points = frame[frame["tokens"].isna()], frame[frame["tokens"].notna()]
    columns = ["device", "16-bit products, TFLOP/s", "memory, TB/s", "source"]
    devices = [(device.name, f"{device.teraflops:g}", f"{device.terabytes:g}", device.source) for device in DEVICES]
    return PAGE.format(
        devices=markdown(pd.DataFrame(devices, columns=columns)),
        added=markdown(_shares(summed, [PUSH, BOUND, NAIVE, ROW])),
        parts=markdown(_shares(summed, [*dict.fromkeys(PARTS.values()), OTHER])),
        approximations=markdown(_shares(summed, [PUSH, *APPROXIMATIONS])),
        hook_points=markdown(_hook_points(hook_points)),
    )


def _shares(frame: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    """Make a table of what each part adds to the base step, with a row for every case and device."""
    table = []
    for key, rows in frame.groupby(KEY, sort=False):
        rows = rows.set_index("part")
        cells = dict(zip(KEY, map(str, key), strict=True)) | {f"{BASE}, ms": f"{rows.loc[BASE, 'ms']:.1f}"}
        shares = {part: f"+{100 * rows.loc[part, 'share']:.2f} %" for part in parts if part in rows.index}
        table.append(cells | shares)
    return printed(table)


def _hook_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Make a table of one hook point of every kind, with its time on every device."""
    table, shape = [], ["model", "side", "images", "tokens", "channels", "sites"]
    frame = frame.astype({"tokens": int, "channels": int, "sites": int})
    for key, rows in frame.groupby([*shape, "operations"], sort=False):
        sites = rows["sites"].iloc[0]
        cells = dict(zip(shape, map(str, key[:-1]), strict=True))
        cells |= {name: f"{rows[name].iloc[0] / sites:.3g}" for name in WORK[:3]}
        times = rows.set_index("device")["ms"] / sites
        table.append(cells | {f"{device}, us": f"{1000 * time:.0f}" for device, time in times.items()})
    return printed(table)


PAGE = """# roofline

What NegToMe costs at full size, predicted from shapes. Nothing was measured. The time of an operation is
max(FLOPs / peak, bytes / bandwidth), and every operation reads its inputs from memory and writes its outputs to it.
Launches, Python and caches are left out. float16 and bfloat16 cost the same at the hook points. A row is one step in
the timestep range, with guidance in the batch for SDXL. Shares are of the base step: the same step without NegToMe.

{devices}

## Added to a step

Four images are pushed from the first. A single image is pushed from a reference image, which is one more row in the
batch; that row comes on top of NegToMe. The lower bound is that of `latency`: the bare matrix product, and one pass
over the tokens that move. The naive transcription makes the passes of the released code, at the same hook points.

{added}

## By part

{parts}

## Approximations

Hook points in a row with feature maps of one size share the match of the first of them. Or tokens are matched in a
random projection to fewer channels. The library has neither; `experiment=ablate_approximation` measures what they do to
images.

{approximations}

## One hook point

{hook_points}
"""


def main(argv: Sequence[str]) -> None:
    """Write the table of the full-size cases of the latency suite, and print its page."""
    overrides = ["experiment=latency", "latency.suite=full", "latency.curves=false", *argv]
    cfg, rows = composed(*overrides), []
    for case in configured_cases(overrides):
        spec = cfg.latency.random[case.model.architecture]
        rows += rows_of_case(case, build_pipeline(spec, "meta", getattr(torch, case.model.dtype)), spec)
    path = result_file(cfg.results, "roofline")
    write_text(path, csv_text(pd.DataFrame(rows, columns=COLUMNS)))
    page = render(read_csv(path))
    write_text(path.with_suffix(".md"), page)
    print(page)
