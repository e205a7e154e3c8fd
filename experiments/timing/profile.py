"""Where the time of the method goes: its parts by the clock, and the push operation by operation.

The parts are measured in place, in calls like the measured ones. That is far less noisy than the difference between two
steps, and tells what there is outside the window too; it does not tell what the parts do to the rest of the step, such
as to its caches. The operations come from torch's profiler, which slows down small ones: their shares are scaled to the
push as the clock saw it.

What is timed is what attaching added to the calls of the denoiser and of the sites: from where a call is entered to
where the module's own begins, and from where that ends to where the call is left.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import negtome
from experiments import synchronize
from experiments.timing.clock import denoiser_of

BEFORE, PUSH, AFTER = "before the denoiser", "push", "after the denoiser"
#: `BEFORE` and `AFTER` in a step outside the window.
OUTSIDE = "outside the window"
#: Operations of the push that are told one by one; the others are added up.
TOLD = 8


class Part(NamedTuple):
    """What a part of the method, or an operation of the push, takes in one step."""

    operation: str
    operation_calls: float
    host_ms: float  # of the thread that calls; on a CPU that is all
    device_ms: float  # between two events in the stream, or of an operation's kernels; NaN on a CPU


def parts(
    pipe: Any, attach: Callable[[], AbstractContextManager], call: Callable[[], Any], rounds: int, device: str
) -> list[Part]:
    """Take the method's part of a step, the median one, apart.

    Args:
        pipe: the pipeline, not compiled.
        attach: attaches NegToMe to it for a block, as `negtome.attach` does.
        call: calls it once, with one call of the denoiser a step, so without true guidance of Flux.
        rounds: how often it is called for the parts; twice more for the operations.
        device: torch device.

    Returns:
        The parts in their order, the push followed by its operations, the longest first; then a step `OUTSIDE`.
    """
    cuda = device.startswith("cuda")

    def run(events: bool) -> list[tuple[bool, dict[str, list[_Span]]]]:
        with attach() as attached, _watched(pipe, attached, events) as steps:
            call()
        synchronize(device)
        return list(zip([step.active for step in attached.steps], steps, strict=True))

    steps = [step for _ in range(rounds) for step in run(cuda)]
    inside = [step for active, step in steps if active]
    outside = [step[BEFORE] + step[AFTER] for active, step in steps if not active]
    before, push, after = (_median(part, [step[part] for step in inside]) for part in (BEFORE, PUSH, AFTER))
    run(events=False)  # so that nothing is done for the first time under the profiler
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        profiled = run(events=False)
    told = operations(profiler.events(), sum(active for active, _ in profiled), push)
    return [before, push, *told, after, _median(OUTSIDE, outside)]


class _Span:
    """Times the host and, on CUDA, the stream from now on until it ends."""

    def __init__(self, part: str, cuda: bool) -> None:
        self.part, self._range = part, record_function(part)
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
def _watched(pipe: Any, attached: negtome.Attachment, cuda: bool) -> Iterator[list[dict[str, list[_Span]]]]:
    """Yield what fills with the spans of the method, by call of the denoiser and part, until the block ends."""
    steps: list[dict[str, list[_Span]]] = []
    with contextlib.ExitStack() as stack:

        def watch(module: torch.nn.Module, before: str, after: str) -> None:
            cls, span = type(module), None

            def begin(part: str) -> None:
                nonlocal span
                span = _Span(part, cuda)

            def end() -> None:
                span.end()
                steps[-1][span.part].append(span)

            def __call__(watched: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
                if before == BEFORE:
                    steps.append(defaultdict(list))
                begin(before)
                output = cls.__call__(watched, *args, **kwargs)
                end()
                return output

            module.__class__ = type(cls.__name__, (cls,), {"__call__": __call__})
            stack.callback(setattr, module, "__class__", cls)
            stack.callback(module.register_forward_pre_hook(lambda *_: end()).remove)
            stack.callback(module.register_forward_hook(lambda *_: begin(after)).remove)

        denoiser = denoiser_of(pipe)
        for name in attached.sites:
            watch(denoiser.get_submodule(name), PUSH, PUSH)
        watch(denoiser, BEFORE, AFTER)
        yield steps


def _median(operation: str, steps: Sequence[Sequence[_Span]]) -> Part:
    """Return the median over steps of what each step's spans take together."""
    totals = [(len(step), sum(span.host_ms for span in step), sum(span.device_ms for span in step)) for step in steps]
    spans, host, device = np.median(totals, axis=0).tolist()
    # Of a site's two spans, one holds its push; a step outside the window is told by both spans of the denoiser.
    return Part(operation, spans / 2 if operation in (PUSH, OUTSIDE) else spans, host, device)


def operations(events: Sequence[Any], steps: int, push: Part) -> list[Part]:
    """Return what the push is made of, by the events of torch's profiler in so many steps of the window.

    The host's times are scaled to those of the push as the clock saw it, without a profiler.
    """
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))  # calls, ms of the host and of the device
    for event in events:
        if event.device_type == DeviceType.CPU and _in_push(event):
            totals[event.name] += [1, event.self_cpu_time_total / 1000, event.self_device_time_total / 1000]
    on_device = np.nan if np.isnan(push.device_ms) else 1 / steps
    scale = [1 / steps, push.host_ms / sum(host for _, host, _ in totals.values()), on_device]
    between = totals.pop(PUSH) * scale
    longest = sorted(
        totals, key=lambda name: tuple(totals[name][:0:-1]), reverse=True
    )  # on the device, then on the host
    found = [(name, totals[name] * scale) for name in longest]
    # Kernels may take a little longer under the profiler than all of the push without it.
    between[[0, 2]] = push.operation_calls, np.maximum(0, push.device_ms - sum(total[2] for _, total in found))
    rest = [("other operations", sum(total for _, total in found[TOLD:]))] if found[TOLD:] else []
    return [
        Part(f"{PUSH}: {name.removeprefix('aten::')}", *total.tolist())
        for name, total in [*found[:TOLD], *rest, ("between its operations", between)]
    ]


def _in_push(event: Any) -> bool:
    return event is not None and (event.name == PUSH or _in_push(event.cpu_parent))
