"""How calls of a pipeline are timed: step by step, every variant in its turn.

A round calls the pipeline once for every variant and then once more in the opposite order, so that a drift of the
machine falls on all of them alike. A step is what lies between two of the pipeline's callbacks at the end of a step:
denoiser, guidance, scheduler and whatever they wait for. On CUDA it is taken with events in the stream, without waiting
for the device in between; elsewhere with the clock. Every ratio is of the same steps of the same round; stated is the
median over rounds, and the interval that holds it whatever the distribution. Calls differ among each other by more than
the steps within one, so rounds are many and calls short.
"""

import gc
import itertools
import time
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
    """Measured calls, or one, of which the leading dimensions are left out.

    Attributes:
        steps: [rounds, calls, steps] seconds of each step.
        seconds: [rounds, calls] of the whole call.
        peak: [rounds, calls] of memory, in bytes; NaN where it is not known, as on a CPU.
        pushed_share: [rounds, calls] of the compared tokens; NaN where nothing was attached.
    """

    steps: Any
    seconds: Any
    peak: Any = np.nan
    pushed_share: Any = np.nan


def inside_of(timesteps: Sequence[float], window: Window) -> np.ndarray:
    """Tell for each training timestep whether a window contains it."""
    return np.array([*map(negtome.NegToMeConfig(timestep_range=window).is_active, timesteps)])


def take_rounds(names: Sequence[str], rounds: int, run: Callable[[str], Timing], label: str = "") -> dict[str, Timing]:
    """Measure every variant twice a round, there and back; all of a variant's calls in one."""
    calls: dict[str, list[Timing]] = {name: [] for name in names}
    for name in tqdm((*names, *reversed(names)) * rounds, desc=label, unit="call", dynamic_ncols=True):
        calls[name].append(run(name))
    return {
        name: Timing(*(np.reshape(values, (rounds, 2, *np.shape(values)[1:])) for values in zip(*taken, strict=True)))
        for name, taken in calls.items()
    }


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

    gc.collect(1)  # what the last call left; all of it would take as long as a small model's call
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    progress_bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: mark() or progress_bar(*args, **kwargs)
    gc.disable()
    try:
        start = time.perf_counter()
        pipe(**call, generator=generator, callback_on_step_end=lambda _, index, timestep, tensors: mark() or tensors)
        synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
        del pipe.progress_bar
    timing = Timing([a.elapsed_time(b) / 1000 if cuda else b - a for a, b in itertools.pairwise(marks)], seconds)
    if cuda:
        timing = timing._replace(peak=torch.cuda.max_memory_allocated(device))
    if attached is not None:
        done = attached.summary()
        timing = timing._replace(pushed_share=done["tokens_pushed"] / max(1, done["tokens_compared"]))
    return timing


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
