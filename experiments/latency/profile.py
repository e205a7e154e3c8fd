"""The time of the method by parts, from the wall clock, and of the push by operations.

The parts are measured in place, which is far less noisy than the difference between two steps, but leaves out what they
do to the rest of the step, such as to its caches. A part is the time that attaching added to a call of the denoiser or
of a hook point, before and after the module's original call. The operations come from torch's profiler, which slows
down small ones; their shares are scaled to the push by the wall clock.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import negtome
from experiments import synchronize
from experiments.latency.clock import denoiser_of

BEFORE, PUSH, AFTER = "before the denoiser", "push", "after the denoiser"
#: `BEFORE` and `AFTER` in a step outside the window.
OUTSIDE = "outside the window"
#: Number of operations of the push that have a row; the others are added up.
LISTED = 8
#: Columns of a part or operation, for one step. host_ms: of the calling thread. device_ms: between two events in the
#: stream, or of an operation's kernels; NaN on a CPU.
TAKEN = ["operation_calls", "host_ms", "device_ms"]


def parts(
    pipe: Any, attach: Callable[[], AbstractContextManager], call: Callable[[], Any], rounds: int, device: str
) -> pd.DataFrame:
    """Measure the parts that the method adds to the median step.

    Args:
        pipe: the pipeline, not compiled.
        attach: attaches NegToMe to it for a block, as `negtome.attach` does.
        call: calls it once, with one call of the denoiser a step, so without true guidance of Flux.
        rounds: how often it is called for the parts; twice more for the operations.
        device: torch device.

    Returns:
        `TAKEN`, by `operation`: the parts in their order, the push followed by its operations, the longest first; then
        a step `OUTSIDE`.
    """
    cuda = device.startswith("cuda")

    def run(events: bool) -> pd.DataFrame:
        with attach() as attached, _watched(pipe, attached, events) as spans:
            call()
        synchronize(device)
        rows = [(span.part, span.step, 1, span.host_ms, span.device_ms) for span in spans]
        table = pd.DataFrame(rows, columns=["operation", "step", *TAKEN])
        return table.assign(active=table["step"].map(lambda step: attached.steps[step].active))

    spans = pd.concat([run(cuda).assign(run=number) for number in range(rounds)])
    spans = spans[spans["active"] | (spans["operation"] != PUSH)]
    spans = spans.assign(operation=spans["operation"].where(spans["active"], OUTSIDE))
    # min_count: of NaN alone, NaN.
    median = spans.groupby(["operation", "run", "step"])[TAKEN].sum(min_count=1).groupby("operation").median()
    # One of a hook point's two spans holds its push; a step outside the range has both spans of the denoiser.
    median.loc[[PUSH, OUTSIDE], "operation_calls"] /= 2
    run(events=False)  # so that nothing is done for the first time under the profiler
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        profiled = run(events=False)
    of_push = operations(profiler.events(), profiled["step"][profiled["active"]].nunique(), median.loc[PUSH])
    return pd.concat([median.loc[[BEFORE, PUSH]], of_push, median.loc[[AFTER, OUTSIDE]]]).rename_axis("operation")


class _Span:
    """Times the host and, on CUDA, the stream from now on until it ends."""

    def __init__(self, part: str, step: int, cuda: bool) -> None:
        self.part, self.step, self._range = part, step, record_function(part)
        self._range.__enter__()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        if cuda:
            self._events[0].record()
        self._begun = time.perf_counter()  # without the events, which are not the method's

    def end(self) -> None:
        self.host_ms = 1000 * (time.perf_counter() - self._begun)
        if self._events:
            self._events[1].record()
        self._range.__exit__(None, None, None)

    @property
    def device_ms(self) -> float:
        return self._events[0].elapsed_time(self._events[1]) if self._events else np.nan


@contextlib.contextmanager
def _watched(pipe: Any, attached: negtome.Attachment, cuda: bool) -> Iterator[list[_Span]]:
    """Yield a list to which every span of the method is appended until the block ends."""
    spans: list[_Span] = []

    def begin(part: str) -> None:
        step = spans[-1].step if spans else -1
        spans.append(_Span(part, step + 1 if part == BEFORE else step, cuda))

    def watch(module: torch.nn.Module, before: str, after: str) -> None:
        cls = type(module)

        def __call__(watched: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            begin(before)
            output = cls.__call__(watched, *args, **kwargs)
            spans[-1].end()
            return output

        module.__class__ = type(cls.__name__, (cls,), {"__call__": __call__})
        stack.callback(setattr, module, "__class__", cls)
        stack.callback(module.register_forward_pre_hook(lambda *_: spans[-1].end()).remove)
        stack.callback(module.register_forward_hook(lambda *_: begin(after)).remove)

    with contextlib.ExitStack() as stack:
        denoiser = denoiser_of(pipe)
        for name in attached.sites:
            watch(denoiser.get_submodule(name), PUSH, PUSH)
        watch(denoiser, BEFORE, AFTER)
        yield spans


def operations(events: Iterable[Any], steps: int, push: pd.Series) -> pd.DataFrame:
    """Return the operations of the push, in the columns of `parts`, from the events of torch's profiler.

    Args:
        events: of so many `steps` in the timestep range.
        push: its time by the wall clock, without a profiler; the host's times are scaled to it.
    """
    rows = [
        (event.name.removeprefix("aten::"), 1, event.self_cpu_time_total / 1000, event.self_device_time_total / 1000)
        for event in events
        if event.device_type == DeviceType.CPU and _in_push(event)
    ]
    table = pd.DataFrame(rows, columns=["operation", *TAKEN]).groupby("operation", sort=False).sum()
    table = table.sort_values(["device_ms", "host_ms"], ascending=False)
    on_device = np.nan if np.isnan(push["device_ms"]) else 1 / steps
    table *= [1 / steps, push["host_ms"] / table["host_ms"].sum(), on_device]
    between, table = table.loc[PUSH], table.drop(PUSH)
    listed = table[:LISTED].copy()
    if len(table) > LISTED:
        listed.loc["other operations"] = table[LISTED:].sum(skipna=False)
    # Kernels may take a little longer under the profiler than the push without it.
    rest = np.maximum(0, push["device_ms"] - table["device_ms"].sum(skipna=False))
    listed.loc["between its operations"] = [push["operation_calls"], between["host_ms"], rest]
    return listed.rename(index=lambda operation: f"{PUSH}: {operation}")


def _in_push(event: Any) -> bool:
    return event is not None and (event.name == PUSH or _in_push(event.cpu_parent))
