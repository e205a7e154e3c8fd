"""Where the time of the method goes: its parts by the clock, and the push operation by operation.

The parts are measured in place, in calls like the measured ones. That is far less noisy than the difference between two
steps, and tells what there is outside the window too; it does not tell what the parts do to the rest of the step, such
as to its caches. The operations come from torch's profiler, which slows down small ones: their shares are scaled to the
push as the clock saw it.

What is timed is what attaching added to the calls of the denoiser and of the sites: from where a call is entered to
where the module's own begins, and from where that ends to where the call is left.
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
#: Operations of the push that are told one by one; the others are added up.
TOLD = 8
#: What a part of the method, or an operation of the push, takes in one step. host_ms: of the thread that calls; on a
#: CPU that is all. device_ms: between two events in the stream, or of an operation's kernels; NaN on a CPU.
TAKEN = ["operation_calls", "host_ms", "device_ms"]


def parts(
    pipe: Any, attach: Callable[[], AbstractContextManager], call: Callable[[], Any], rounds: int, device: str
) -> pd.DataFrame:
    """Take the method's part of a step, the median one, apart.

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
        told = [(span.part, span.step, 1, span.host_ms, span.device_ms) for span in spans]
        table = pd.DataFrame(told, columns=["operation", "step", *TAKEN])
        return table.assign(active=table["step"].map(lambda step: attached.steps[step].active))

    spans = pd.concat([run(cuda).assign(run=number) for number in range(rounds)])
    spans = spans[spans["active"] | (spans["operation"] != PUSH)]
    spans = spans.assign(operation=spans["operation"].where(spans["active"], OUTSIDE))
    # min_count: of NaN alone, NaN.
    median = spans.groupby(["operation", "run", "step"])[TAKEN].sum(min_count=1).groupby("operation").median()
    # Of a site's two spans, one holds its push; a step outside the window is told by both spans of the denoiser.
    median.loc[[PUSH, OUTSIDE], "operation_calls"] /= 2
    run(events=False)  # so that nothing is done for the first time under the profiler
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        profiled = run(events=False)
    told = operations(profiler.events(), profiled["step"][profiled["active"]].nunique(), median.loc[PUSH])
    return pd.concat([median.loc[[BEFORE, PUSH]], told, median.loc[[AFTER, OUTSIDE]]]).rename_axis("operation")


class _Span:
    """Times the host and, on CUDA, the stream from now on until it ends."""

    def __init__(self, part: str, step: int, cuda: bool) -> None:
        self.part, self.step, self._range = part, step, record_function(part)
        self._range.__enter__()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        for event in self._events[:1]:
            event.record()
        self._begun = time.perf_counter()  # without the events, which are not the method's

    def end(self) -> None:
        self.host_ms = 1000 * (time.perf_counter() - self._begun)
        for event in self._events[1:]:
            event.record()
        self._range.__exit__(None, None, None)

    @property
    def device_ms(self) -> float:
        return self._events[0].elapsed_time(self._events[1]) if self._events else np.nan


@contextlib.contextmanager
def _watched(pipe: Any, attached: negtome.Attachment, cuda: bool) -> Iterator[list[_Span]]:
    """Yield what fills with the spans of the method, one after the other, until the block ends."""
    spans: list[_Span] = []

    def begin(part: str) -> None:
        step = spans[-1].step if spans else -1
        spans.append(_Span(part, step + (part == BEFORE), cuda))

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
    """Return what the push is made of, as `parts` does, by the events of torch's profiler.

    Args:
        events: of so many `steps` of the window.
        push: what it takes as the clock saw it, without a profiler; the host's times are scaled to it.
    """
    told = [
        (event.name.removeprefix("aten::"), 1, event.self_cpu_time_total / 1000, event.self_device_time_total / 1000)
        for event in events
        if event.device_type == DeviceType.CPU and _in_push(event)
    ]
    found = pd.DataFrame(told, columns=["operation", *TAKEN]).groupby("operation", sort=False).sum()
    found = found.sort_values(["device_ms", "host_ms"], ascending=False)
    on_device = np.nan if np.isnan(push["device_ms"]) else 1 / steps
    found *= [1 / steps, push["host_ms"] / found["host_ms"].sum(), on_device]
    between, found = found.loc[PUSH], found.drop(PUSH)
    table = found[:TOLD].copy()
    if len(found) > TOLD:
        table.loc["other operations"] = found[TOLD:].sum(skipna=False)
    # Kernels may take a little longer under the profiler than all of the push without it.
    left = np.maximum(0, push["device_ms"] - found["device_ms"].sum(skipna=False))
    table.loc["between its operations"] = [push["operation_calls"], between["host_ms"], left]
    return table.rename(index=lambda operation: f"{PUSH}: {operation}")


def _in_push(event: Any) -> bool:
    return event is not None and (event.name == PUSH or _in_push(event.cpu_parent))
