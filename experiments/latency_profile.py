"""Where the time of the method goes: its parts by the clock, and the push operation by operation.

The parts are measured in place, in calls like the measured ones. That is far less noisy than the difference between two
steps, and tells what there is outside the window too; it does not tell what the parts do to the rest of the step, such
as to its caches. The operations come from torch's profiler, which slows down small ones: their shares are scaled to the
push as the clock saw it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from experiments import synchronize
from experiments.latency_report import OUTSIDE
from negtome.attachment import Attachment
from negtome.pushing import Site, subclass

BEFORE = "before the denoiser"
PUSH = "push"
AFTER = "after the denoiser"
#: Operations of the push that are told one by one; the others are added up.
TOLD = 8


class Part(NamedTuple):
    """What a part of the method takes in one step.

    Attributes:
        operation: `BEFORE`, `PUSH`, "push: NAME" of each of its operations, `AFTER`; or `OUTSIDE`, `BEFORE` and `AFTER`
            in a step outside the window.
        calls: how often it happens in a step.
        host_ms: the time of the thread that calls, in milliseconds; on a CPU that is all.
        device_ms: the time between two events in the stream, or of an operation's kernels; None on a CPU.
    """

    operation: str
    calls: float
    host_ms: float
    device_ms: float | None


def parts(run: Callable[[], Sequence[bool]], calls: int, device: str) -> list[Part]:
    """Take the method's part of a step apart.

    Args:
        run: attaches NegToMe, calls the pipeline once, and returns for each step whether it was in the window. Not
            compiled, and with one call of the denoiser a step, so without true guidance of Flux.
        calls: how often it is run for the parts; twice more for the operations.
        device: torch device.

    Returns:
        The parts, of the median step: those of a step in the window in their order, the push followed by its
        operations, the longest first; then what there is in a step outside.
    """
    clock = _Clock(device)
    steps: list[tuple[bool, dict[str, list[_Span]]]] = []
    with clock.watching():
        for _ in range(calls):
            clock.steps.clear()
            active = run()
            synchronize(device)
            steps += zip(active, clock.steps, strict=True)
    inside = [step for active, step in steps if active]
    outside = [[span for spans in step.values() for span in spans] for active, step in steps if not active]
    push = _median(PUSH, [step[PUSH] for step in inside])
    return [
        _median(BEFORE, [step[BEFORE] for step in inside]),
        push,
        *_operations(run, push, device),
        _median(AFTER, [step[AFTER] for step in inside]),
        _median(OUTSIDE, outside)._replace(calls=1),
    ]


class _Span(NamedTuple):
    """How long something took the host and, on CUDA, between which events of the stream it lies."""

    host_ms: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None

    @property
    def device_ms(self) -> float | None:
        return None if self.events is None else self.events[0].elapsed_time(self.events[1])


class _Clock:
    """Notes when the method's own functions run, by call of the denoiser and part."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.steps: list[dict[str, list[_Span]]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is attached inside the block."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in (
                (Attachment, "_begin", BEFORE),
                (Site, "push", PUSH),
                (Attachment, "_end", AFTER),
            ):
                stack.enter_context(mock.patch.object(owner, name, self._watch(part, getattr(owner, name))))
            subclass.cache_clear()  # its classes hold the functions as they were
            stack.callback(subclass.cache_clear)
            yield

    def _watch(self, part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if part == BEFORE:
                self.steps.append(defaultdict(list))
            with record_function(part):
                first = _event() if self.cuda else None
                begun = time.perf_counter()
                result = function(*args, **kwargs)
                host_ms = 1000 * (time.perf_counter() - begun)  # without the events, which are not the method's
                self.steps[-1][part].append(_Span(host_ms, (first, _event()) if self.cuda else None))
            return result

        return watched


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _median(operation: str, steps: Sequence[Sequence[_Span]]) -> Part:
    """Return the median over steps of what each step's spans take together."""

    def of(quantity: str) -> float | None:
        values = [[getattr(span, quantity) for span in spans] for spans in steps]
        return None if None in values[0] else float(np.median([sum(value) for value in values]))

    return Part(operation, float(np.median([len(spans) for spans in steps])), of("host_ms"), of("device_ms"))


def _operations(run: Callable[[], Sequence[bool]], push: Part, device: str) -> list[Part]:
    """Return what the push is made of; the host's times are scaled to those of the push without a profiler."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _Clock("cpu").watching():
        run()  # so that nothing is done for the first time under the profiler
        with profile(activities=activities) as profiler:
            steps = sum(run())
            synchronize(device)
    host, on_device, count = Counter(), Counter(), Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and (name := _within_push(event)):
            host[name] += event.self_cpu_time_total / 1000 / steps
            on_device[name] += event.self_device_time_total / 1000 / steps
            count[name] += 1 / steps
    scale = push.host_ms / sum(host.values())
    own = Part("between its operations", push.calls, scale * host.pop(PUSH), None)
    found = [Part(name, count[name], scale * host[name], on_device[name] if cuda else None) for name in host]
    if cuda:
        # Kernels may take a little longer under the profiler than all of the push without it.
        own = own._replace(device_ms=max(0.0, push.device_ms - sum(part.device_ms for part in found)))
    found.sort(key=lambda part: (-(part.device_ms or 0), -part.host_ms))
    few, many = found[:TOLD], found[TOLD:]
    if many:
        small = [sum(part[i] for part in many) for i in (1, 2)]
        few.append(Part("other operations", *small, sum(part.device_ms for part in many) if cuda else None))
    return [part._replace(operation=f"{PUSH}: {part.operation.removeprefix('aten::')}") for part in [*few, own]]


def _within_push(event: Any) -> str | None:
    """Return the name of an event of the profiler that is the push or lies in it."""
    name = event.name
    while event is not None:
        if event.name == PUSH:
            return name
        event = event.cpu_parent
    return None
