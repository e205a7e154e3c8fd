"""Timing of pipeline calls, step by step, every variant in its turn.

A round calls the pipeline once for every variant and then once more in the opposite order, so that a drift of the
machine falls on all of them alike. A step lies between two of the pipeline's callbacks: denoiser, guidance and
scheduler. On CUDA it is timed by events in the stream, without waiting for the device; elsewhere by the wall clock.
"""

import gc
import itertools
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import negtome
from experiments import synchronize
from experiments.latency.cases import Window
from negtome.sites import find_architecture


class Timing(NamedTuple):
    """Measured calls, or one call without the leading dimensions.

    Attributes:
        steps: [rounds, calls, steps] seconds of each step.
        seconds: [rounds, calls] of the whole call.
        peak: [rounds, calls] of memory, in bytes; NaN where it is unknown, as on a CPU.
        pushed_share: [rounds, calls] of the compared tokens; NaN where nothing was attached.
    """

    steps: Any
    seconds: Any
    peak: Any = np.nan
    pushed_share: Any = np.nan


def inside_of(timesteps: Sequence[float], window: Window) -> np.ndarray:
    """Tell for each training timestep whether a timestep range contains it."""
    return np.array([*map(negtome.NegToMeConfig(timestep_range=window).is_active, timesteps)])


def take_rounds(names: Sequence[str], rounds: int, run: Callable[[str], Timing], label: str = "") -> dict[str, Timing]:
    """Measure every variant twice a round, there and back, and join all calls of a variant."""
    calls: dict[str, list[Timing]] = {name: [] for name in names}
    for name in tqdm((*names, *reversed(names)) * rounds, desc=label, unit="call", dynamic_ncols=True):
        calls[name].append(run(name))
    return {
        name: Timing(*(np.reshape(values, (rounds, 2, *np.shape(values)[1:])) for values in zip(*timings, strict=True)))
        for name, timings in calls.items()
    }


def time_call(pipe: Any, call: Mapping[str, Any], device: str, attached: negtome.Attachment | None = None) -> Timing:
    """Call the pipeline once, with a mark at the beginning of its loop and at the end of every step."""
    cuda = device.startswith("cuda")
    marks: list[Any] = []

    def read_clock() -> float:
        synchronize(device)
        return time.perf_counter()

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(read_clock())

    gc.collect(1)  # what the last call left; a full collection would take as long as a small model's call
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    arguments = {
        **call,
        "generator": torch.Generator().manual_seed(0),
        "callback_on_step_end": lambda _, index, timestep, tensors: mark() or tensors,
    }
    progress_bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: mark() or progress_bar(*args, **kwargs)
    try:
        seconds = timeit.timeit(lambda: pipe(**arguments), timer=read_clock, number=1)  # without garbage collection
    finally:
        del pipe.progress_bar
    steps = [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated(device) if cuda else np.nan
    if attached is None:
        return Timing(steps, seconds, peak)
    summary = attached.summary()
    return Timing(steps, seconds, peak, summary["tokens_pushed"] / max(1, summary["tokens_compared"]))


def timesteps_of(pipe: Any, call: Mapping[str, Any]) -> list[float]:
    """Return the training timesteps of a call's steps, by a call with a denoiser that returns zeros."""
    denoiser = denoiser_of(pipe)

    def zeros(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),)

    denoiser.forward = zeros
    try:
        pipe(**{**call, "output_type": "latent"})
    finally:
        del denoiser.forward
    return pipe.scheduler.timesteps.tolist()


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """Return a pipeline's UNet or transformer."""
    return getattr(pipe, find_architecture(pipe).denoiser)
