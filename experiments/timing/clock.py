"""How calls of a pipeline are timed: step by step, every variant in its turn."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import negtome
from experiments import synchronize
from experiments.timing.cases import Window
from negtome.sites import find_architecture


class Timing(NamedTuple):
    """One measured call: seconds of each step and of the whole call, its peak memory in bytes, the share pushed."""

    steps: list[float]
    seconds: float
    peak: int | None = None
    pushed_share: float | None = None


def inside_of(timesteps: Sequence[float], window: Window) -> list[bool]:
    """Tell for each training timestep whether a window contains it."""
    config = negtome.NegToMeConfig(timestep_range=window)
    return [config.is_active(timestep) for timestep in timesteps]


def take_rounds(
    names: Sequence[str], rounds: int, run: Callable[[str], Timing], label: str = ""
) -> dict[str, list[list[Timing]]]:
    """Measure every variant twice a round, there and back; returned by variant, round and call."""
    timings: dict[str, list[list[Timing]]] = {name: [[] for _ in range(rounds)] for name in names}
    order = [(number, name) for number in range(rounds) for name in (*names, *reversed(names))]
    for number, name in tqdm(order, desc=label, unit="call", dynamic_ncols=True):
        timings[name][number].append(run(name))
    return timings


def time_call(pipe: Any, call: Mapping[str, Any], device: str, attached: negtome.Attachment | None = None) -> Timing:
    """Call the pipeline once, with a mark at the beginning of its loop and at the end of every step."""
    cuda = device.startswith("cuda")
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            synchronize(device)
            marks.append(time.perf_counter())

    def loop_begins(*args: Any, **kwargs: Any) -> Any:
        mark()
        return progress_bar(*args, **kwargs)

    def end_of_step(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        mark()
        return tensors

    gc.collect(1)  # what the last call left; all of it would take as long as a small model's call
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    progress_bar, pipe.progress_bar = pipe.progress_bar, loop_begins
    gc.disable()
    try:
        start = time.perf_counter()
        pipe(**call, generator=generator, callback_on_step_end=end_of_step)
        synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
        del pipe.progress_bar
    pairs = itertools.pairwise(marks)
    steps = [begin.elapsed_time(end) / 1000 if cuda else end - begin for begin, end in pairs]
    done = None if attached is None else attached.summary()
    share = done and done["tokens_pushed"] / max(1, done["tokens_compared"])
    return Timing(steps, seconds, torch.cuda.max_memory_allocated(device) if cuda else None, share)


def timesteps_of(pipe: Any, call: Mapping[str, Any]) -> list[float]:
    """Return the training timesteps of a call's steps, from a run of the pipeline with a denoiser that does nothing."""
    denoiser = denoiser_of(pipe)

    def nothing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),)

    denoiser.forward = nothing
    try:
        pipe(**{**call, "output_type": "latent"})
    finally:
        del denoiser.forward
    return pipe.scheduler.timesteps.tolist()


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """Return a pipeline's UNet or transformer."""
    return getattr(pipe, find_architecture(pipe).denoiser)
