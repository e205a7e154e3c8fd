"""What the method costs: time and memory of the same calls without and with it, in turns, in one process.

    python -m experiments.latency experiment=latency
    python -m experiments.latency experiment=latency latency.only=[sdxl-1024] force=true

The configuration says what is measured (conf/experiment/latency.yaml). Each case is one row a variant and window in
`<results>/latency.csv`, written when the case is done; a case that is there already, of this device, these versions and
this code, is skipped. Tables and figures are made of the CSV (experiments/latency_report.py); of the CSV as it is with
latency.cases=false latency.curves=false.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import logging
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from scipy.stats import binom
from tqdm import tqdm

import negtome
from eval.files import write_text
from experiments import (
    PROJECT,
    latency_profile,
    latency_report,
    naive,
    pipelines,
    project_path,
    random_weights,
    select_device,
    synchronize,
)
from experiments.configs import expand, flag
from experiments.latency_report import BOUND, MEASURED, METHOD, PLAIN
from experiments.locks import locked
from experiments.runs import canonical, current_commit

# How: a round calls the pipeline once for every variant and then once more in the opposite order, so that a drift of
# the machine falls on all of them alike. A step is what lies between two of the pipeline's callbacks at the end of a
# step: denoiser, guidance, scheduler and whatever they wait for. On CUDA it is taken with events in the stream,
# without waiting for the device in between; elsewhere with the clock. Every ratio is of the same steps of the same
# round; stated is the median over rounds, and the interval that holds it whatever the distribution. Calls differ among
# each other by more than the steps within one, so rounds are many and calls short.

log = logging.getLogger(__name__)

#: Raise when the same settings would be measured in another way.
LATENCY_VERSION = 1
#: What the numbers depend on beside settings and versions: a case is measured anew when one of these files changes.
CODE = [
    *sorted(Path(negtome.__file__).parent.glob("*.py")),
    *(PROJECT / "experiments" / name for name in ("latency.py", "latency_profile.py", "naive.py", "random_weights.py")),
]

#: Columns that tell the measured configurations apart: a new measurement of one replaces all of its rows.
CONFIGURATION = ["experiment", "part", *MEASURED]
COLUMNS = [
    *CONFIGURATION, "variant", "t_low", "t_high", "steps_inside", "matching", "reference", "alpha", "threshold",
    "cross_attention", "pushed_share",
    "inside_ms", "inside_q1_ms", "inside_q3_ms", "inside_ratio", "inside_ratio_low", "inside_ratio_high",
    "outside_ms", "outside_q1_ms", "outside_q3_ms", "outside_ratio", "outside_ratio_low", "outside_ratio_high",
    "call_s", "call_q1_s", "call_q3_s", "call_ratio", "call_ratio_low", "call_ratio_high", "call_how", "image_s",
    "peak_mib", "peak_ratio", "operation", "operation_calls", "host_ms", "device_ms",
    "rounds", "measured_steps", "measured_inside", "torch", "diffusers", "cuda", "python", "setting", "commit",
]  # fmt: skip
#: Columns that hold text also where they look like numbers.
TEXT = dict.fromkeys(("setting", "commit", "torch", "diffusers", "cuda", "python", "call_how"), str)


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        name: in the table.
        via: "plain" (nothing attached), "negtome", or "naive" (experiments/naive.py).
        config: fields of `negtome.NegToMeConfig` beside the model's own strengths.
        picture: whether a given image is what the others are pushed from.
        outside: whether the window holds the first step of the call alone, so that all others are outside.
    """

    name: str
    via: str
    config: Mapping[str, Any] = field(default_factory=dict)
    picture: bool = False
    outside: bool = False

    def __post_init__(self) -> None:
        if self.via not in ("plain", "negtome", "naive"):
            raise ValueError(f"via must be plain, negtome or naive, got {self.via!r} in variant {self.name}.")


@dataclass(frozen=True)
class Case:
    """One configuration that is measured with several variants.

    Attributes:
        part: "table", "batch" or "resolution": the table or the curve that its rows belong to. Those for
            `curve_windows` belong to "window", and what a step of the table's method is made of to "profile".
        model: a conf/model/ group.
        side: height and width of the images in pixels.
        batch: images in a call, all of one prompt.
        variants: what is compared; the first is the plain pipeline.
        windows: (low, high) in training timesteps that whole calls are stated for.
        curve_windows: the same for the curve over the window's length, of `curve_variants` alone.
        rounds: how often everything is measured, twice each.
        steps: (inside, outside) the window in a measured call; None: calls of the model's own number of steps.
    """

    part: str
    model: DictConfig
    side: int
    batch: int
    variants: tuple[Variant, ...]
    windows: tuple[tuple[float, float], ...]
    curve_windows: tuple[tuple[float, float], ...]
    curve_variants: tuple[str, ...]
    rounds: int
    steps: tuple[int, int] | None

    def __post_init__(self) -> None:
        if not self.variants or self.variants[0].via != "plain" or self.variants[0].name != PLAIN:
            raise ValueError(f"latency.variants must begin with {PLAIN}: {{via: plain}}, got {self.variants[:1]}.")
        if self.rounds < 1 or (self.steps is not None and min(self.steps) < 1):
            raise ValueError(
                f"rounds and the steps inside and outside the window must be at least 1, got {self.rounds} and "
                f"{self.steps}."
            )

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.side}x{self.side} batch {self.batch}"


class Timing(NamedTuple):
    """One measured call: seconds of each step and of the whole call, its peak memory in bytes, the share pushed."""

    steps: list[float]
    seconds: float
    peak: int | None
    pushed_share: float | None


class Schedule(NamedTuple):
    """The steps of a measured call, and of the whole call that it stands for, by their training timesteps."""

    measured: list[float]
    whole: list[float]
    window: tuple[float, float]  # of the measured call


# What is measured


def configured_cases(overrides: Sequence[str]) -> list[Case]:
    """Return the cases that a command line asks for, the table's first.

    Raises:
        ValueError: there is no such suite or case.
    """
    if any(text.startswith("model=") for text in overrides):
        raise ValueError("expected no model=, which the suite chooses; choose among its cases with latency.only=[NAME]")
    cfg = _settings(overrides)
    settings, suite = cfg.latency, cfg.latency.suite
    if suite == "auto":
        suite = "full" if select_device(cfg.device).startswith("cuda") else "mini"
    if suite not in ("mini", "full"):
        raise ValueError(f"latency.suite must be auto, mini or full, got {suite!r}.")
    cases, curves = flag(cfg, "latency.cases"), flag(cfg, "latency.curves")
    chosen = settings[suite]
    names = {*chosen.cases, *chosen.curves}
    if settings.only is not None and not (OmegaConf.is_list(settings.only) and set(settings.only) <= names):
        raise ValueError(f"latency.only must name cases of the suite {suite}, {sorted(names)}, got {settings.only}.")
    variants = [Variant(name, **OmegaConf.to_container(spec, resolve=True)) for name, spec in settings.variants.items()]

    def wanted(name: str) -> bool:
        return settings.only is None or name in settings.only

    def make(spec: DictConfig, part: str, **changes: Any) -> Case:
        model = _settings([*overrides, f"model={spec.model}"]).model
        own = tuple(model.negtome.timestep_range)
        windows = spec.get("windows")
        options = {
            "model": model,
            "side": spec.side,
            "batch": spec.batch,
            "variants": tuple(variants),
            "windows": (own,) if windows is None else tuple(tuple(window) for window in windows),
            "curve_windows": (),
            "curve_variants": tuple(settings.curve_variants),
            "rounds": spec.rounds,
            "steps": None if spec.steps is None else (spec.steps.inside, spec.steps.outside),
        }
        return Case(part, **(options | changes))

    found = []
    if cases:
        lows = tuple((float(low), 1000.0) for low in settings.curve_windows) if curves else ()
        found += [make(spec, "table", curve_windows=lows) for name, spec in chosen.cases.items() if wanted(name)]
    if curves:
        compared = tuple(variant for variant in variants if variant.name in settings.curve_variants)
        for name, spec in chosen.curves.items():
            if wanted(name):
                found += [make(spec, "batch", batch=batch, variants=compared) for batch in spec.batches]
                found += [make(spec, "resolution", side=side, variants=compared) for side in spec.sides]
    return found


def _settings(overrides: Sequence[str]) -> DictConfig:
    cfg = _composed(tuple(overrides))
    if "latency" not in cfg:
        raise ValueError("expected experiment=latency among the overrides, got none.")
    return cfg


@functools.cache  # a suite composes the same few over and over, a third of a second each
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return expand(list(overrides))[0]


def negtome_config(case: Case, variant: Variant, window: tuple[float, float]) -> negtome.NegToMeConfig:
    """Return the settings of a variant: the model's own strengths, the variant's changes, and a window."""
    own = {key: value for key, value in case.model.negtome.items() if value is not None}
    return negtome.NegToMeConfig(**(own | dict(variant.config) | {"timestep_range": window}))


# Measuring


def measure(case: Case, cfg: DictConfig, device: str) -> list[dict[str, Any]]:
    """Measure one case and return its rows.

    Args:
        case: what is measured.
        cfg: the composed configuration: `latency`, `compile` and `bootstrap.level` are read.
        device: torch device.

    Raises:
        ValueError: the steps of the case do not lie on both sides of a window.
    """
    if device == "cpu":
        torch.set_num_threads(cfg.latency.threads)
    weights = _weights(case.model, cfg.latency.weights)
    pipe = _pipeline(OmegaConf.to_yaml(case.model, resolve=True), weights, device, cfg.compile)
    call = _call(case, pipe, weights)
    whole = timesteps_of(pipe, call)
    if case.steps is None:
        schedule = Schedule(whole, whole, case.windows[0])
    else:
        call["num_inference_steps"] = sum(case.steps)
        steps = timesteps_of(pipe, call)
        schedule = Schedule(steps, whole, (steps[case.steps[0] - 1], 1000.0))
    if all(inside_of(schedule.measured, schedule.window)) or not any(inside_of(schedule.measured, schedule.window)):
        raise ValueError(f"{case.label}: expected steps in and out of {schedule.window}, got {schedule.measured}")

    picture = negtome.Reference(torch.rand(3, case.side, case.side, generator=torch.Generator().manual_seed(1)))
    plans = {v.name: (v, negtome_config(case, v, _window(v, schedule))) for v in case.variants}

    def run(name: str) -> Timing:
        variant, config = plans[name]
        with attached(pipe, variant, config, picture) as attachment:
            return time_call(pipe, call, device, attachment)

    def active_steps() -> list[bool]:
        with attached(pipe, *plans[METHOD], picture) as attachment:
            time_call(pipe, call, device, attachment)
        return [step.active for step in attachment.steps]

    timings, bound, parts = {}, None, []
    with _all_kept():
        names = _warm_up(case, run, plans)
        if PLAIN in names:
            shapes = site_shapes(pipe, call, negtome_config(case, case.variants[0], schedule.window), schedule)
            timings = take_rounds(names, case.rounds, run, case.label)
            bound = lower_bound(shapes, device, getattr(torch, case.model.dtype))
        if case.part == "table" and timings and METHOD in names and not cfg.compile:
            parts = latency_profile.parts(active_steps, case.rounds, device)
    common = _origin(case, cfg, device, weights)
    rows = _rows(case, schedule, plans, timings, bound, cfg.bootstrap.level)
    return [common | row for row in [*rows, *(_profile_row(part, case.rounds, schedule) for part in parts)]]


def inside_of(timesteps: Sequence[float], window: tuple[float, float]) -> list[bool]:
    """Tell for each training timestep whether a window contains it."""
    config = negtome.NegToMeConfig(timestep_range=window)
    return [config.is_active(timestep) for timestep in timesteps]


def turns(names: Sequence[str]) -> list[str]:
    """Return the order of the calls of one round: there and back."""
    return [*names, *reversed(names)]


def take_rounds(
    names: Sequence[str], rounds: int, run: Callable[[str], Timing], label: str = ""
) -> dict[str, list[list[Timing]]]:
    """Measure every variant twice a round, in turns; the result is by variant, round and call."""
    timings: dict[str, list[list[Timing]]] = {name: [[] for _ in range(rounds)] for name in names}
    order = [(number, name) for number in range(rounds) for name in turns(names)]
    for number, name in tqdm(order, desc=label, unit="call", dynamic_ncols=True):
        timings[name][number].append(run(name))
    return timings


def time_call(pipe: Any, call: Mapping[str, Any], device: str, attachment: negtome.Attachment | None = None) -> Timing:
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

    def end_of_step(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        mark()
        return tensors

    gc.collect()
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    gc.disable()
    try:
        with _loop_begins(pipe, mark):
            start = time.perf_counter()
            pipe(**call, generator=generator, callback_on_step_end=end_of_step)
            synchronize(device)
            seconds = time.perf_counter() - start
    finally:
        gc.enable()
    pairs = itertools.pairwise(marks)
    steps = [first.elapsed_time(second) / 1000 if cuda else second - first for first, second in pairs]
    share = None
    if attachment is not None:
        summary = attachment.summary()
        share = summary["tokens_pushed"] / max(1, summary["tokens_compared"])
    return Timing(steps, seconds, torch.cuda.max_memory_allocated(device) if cuda else None, share)


@contextlib.contextmanager
def attached(
    pipe: Any, variant: Variant, config: negtome.NegToMeConfig, picture: negtome.Reference
) -> Iterator[negtome.Attachment | None]:
    """Put a variant into the pipeline for the length of the block."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # Tokens of random weights may all be unlike each other; that costs the same.
        warnings.filterwarnings("ignore", "NegToMe pushed no token", RuntimeWarning)
        if variant.via == "plain":
            yield None
        elif variant.via == "naive":
            stack.enter_context(naive.attach(pipe, config))
            yield None
        else:
            given = picture if variant.picture else None
            yield stack.enter_context(negtome.attach(pipe, config, given=given))


def timesteps_of(pipe: Any, call: Mapping[str, Any]) -> list[float]:
    """Return the training timesteps of a call's steps, from a run of the pipeline with a denoiser that does nothing."""
    denoiser = _denoiser(pipe)
    seen: list[float] = []

    def nothing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),)

    def end_of_step(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(float(timestep))
        return tensors

    denoiser.forward = nothing
    try:
        pipe(**{**call, "output_type": "latent"}, callback_on_step_end=end_of_step)
    finally:
        del denoiser.forward
    return seen


def _warm_up(case: Case, run: Callable[[str], Timing], plans: Iterable[str]) -> list[str]:
    """Call every variant once, and return the names of those that fit into the device's memory."""
    fit = []
    for name in plans:
        try:
            run(name)
            fit.append(name)
        except torch.OutOfMemoryError:
            log.warning("%s: %s does not fit into the device's memory", case.label, name)
        if name not in fit:
            gc.collect()  # once the error is gone, and its frames with it
            torch.cuda.empty_cache()
    return fit


@contextlib.contextmanager
def _all_kept() -> Iterator[None]:
    """Let collections pass over what is there already: there is one a call, as long as a small model's call itself."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _loop_begins(pipe: Any, begin: Callable[[], None]) -> Iterator[None]:
    """Have `begin` called when the pipeline enters its denoising loop, which begins with its progress bar."""
    original = pipe.progress_bar

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        begin()
        return original(*args, **kwargs)

    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        del pipe.progress_bar


def _denoiser(pipe: Any) -> torch.nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def _window(variant: Variant, schedule: Schedule) -> tuple[float, float]:
    return (schedule.measured[0], schedule.measured[0]) if variant.outside else schedule.window


def _weights(model: DictConfig, wanted: str) -> str:
    """Return the fingerprint of the weights that are measured, or "random".

    Raises:
        ValueError: an unknown choice.
        FileNotFoundError: a checkpoint was asked for and is not there.
    """
    if wanted not in ("auto", "random", "checkpoint"):
        raise ValueError(f"latency.weights must be auto, random or checkpoint, got {wanted!r}")
    if wanted == "random":
        return "random"
    if wanted == "checkpoint" or model.kind != "real":
        return pipelines.find_checkpoint(model).fingerprint
    return pipelines.local_fingerprint(model) or "random"


#: The last pipeline, since the cases of a suite mostly share theirs: what it was made of, and itself.
_last: tuple[Any, Any] = (None, None)


def _pipeline(model: str, weights: str, device: str, compiled: bool) -> Any:
    global _last
    key = (model, weights, device, compiled)
    if _last[0] != key:
        _last = (None, None)  # two of full size do not fit beside each other
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        spec = OmegaConf.create(model)
        if weights == "random":
            pipe = random_weights.build_pipeline(spec.architecture, device, getattr(torch, spec.dtype))
        else:
            pipe = pipelines.load(spec, pipelines.find_checkpoint(spec), device)
        if compiled:
            limits = torch._dynamo.config  # of torch 2.6 under its former name
            name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
            setattr(limits, name, 64)  # every variant compiles its own
            _denoiser(pipe).compile()
        _last = (key, pipe)
    return _last[1]


def _call(case: Case, pipe: Any, weights: str) -> dict[str, Any]:
    """Return the arguments of a whole call: of the case's size, and with the model's own number of steps."""
    call = dict(case.model.call) | {"height": case.side, "width": case.side, "num_images_per_prompt": case.batch}
    if weights == "random":
        call.pop("negative_prompt", None)
        text = random_weights.embeddings(pipe, case.batch, call.get("max_sequence_length"))
        return call | text | {"output_type": "latent"}
    # A composed call has no image at its end; a whole one is what a user waits for.
    return call | {"prompt": "a photo of a dog", "output_type": "pil" if case.steps is None else "latent"}


# The floor


class SiteShape(NamedTuple):
    """The image tokens of an attention in a call of the denoiser: [halves * images, tokens, channels]."""

    halves: int
    images: int
    tokens: int
    channels: int


def site_shapes(
    pipe: Any, call: Mapping[str, Any], config: negtome.NegToMeConfig, schedule: Schedule
) -> Counter[SiteShape]:
    """Count the shapes that are pushed in one step of the window; costs one plain call of the pipeline."""
    seen: Counter[SiteShape] = Counter()

    def note(tokens: torch.Tensor, halves: int) -> torch.Tensor:
        seen[SiteShape(halves, tokens.shape[0] // halves, *tokens.shape[1:])] += 1
        return tokens

    with naive.attach(pipe, config, note):
        pipe(**{**call, "output_type": "latent"})
    steps = sum(inside_of(schedule.measured, schedule.window))
    return Counter({shape: count // steps for shape, count in seen.items()})


def product_shapes(shape: SiteShape) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of the two factors that compare all images of each half but the first with the first."""
    halves, images, tokens, channels = shape
    return (halves, (images - 1) * tokens, channels), (halves, channels, tokens)


def lower_bound(shapes: Mapping[SiteShape, int], device: str, dtype: torch.dtype) -> float:
    """Measure what one step of the window must cost at least, in seconds.

    That is, for every site: the bare matrix product of the moving images' tokens with the first image's, and one pass
    over memory that reads and writes the tokens that move.
    """
    return sum(
        count * (_kernel_seconds(shape, device, dtype, "product") + _kernel_seconds(shape, device, dtype, "pass"))
        for shape, count in shapes.items()
    )


def _kernel_seconds(shape: SiteShape, device: str, dtype: torch.dtype, what: str) -> float:
    left, right = (torch.randn(*size, device=device).to(dtype) for size in product_shapes(shape))
    if what == "product":
        out = torch.empty(*left.shape[:2], right.shape[2], device=device, dtype=dtype)

        def work() -> None:
            torch.bmm(left, right, out=out)
    else:
        out = torch.empty_like(left)

        def work() -> None:
            out.copy_(left)

    repeats = 10
    times = []
    for _ in range(7):
        synchronize(device)
        if device.startswith("cuda"):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1000 / repeats)
        else:
            begun = time.perf_counter()
            for _ in range(repeats):
                work()
            synchronize(device)
            times.append((time.perf_counter() - begun) / repeats)
    return float(np.median(times[1:]))  # the first one warms up


# From timings to rows


def median_interval(values: Sequence[float], level: float) -> tuple[float, float | None, float | None]:
    """Return the median of one value a round, and the interval that holds the true median with at least `level`.

    Its ends are values of rounds: as many of them lie beyond each end as a fair coin would seldom leave there. That is
    exact for any distribution, outliers and all, of rounds that are independent.

    Args:
        values: one a round.
        level: such as 0.95.

    Returns:
        Value, low, high; no interval where the rounds are too few for one, fewer than 6 for 0.95.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    beyond = int((binom.cdf(np.arange(len(ordered)), len(ordered), 0.5) <= (1 - level) / 2).sum())
    value = float(np.median(ordered))
    return (value, float(ordered[beyond - 1]), float(ordered[-beyond])) if beyond else (value, None, None)


def per_round(steps: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Return one duration a round [rounds] of steps [rounds, calls, steps]: the mean of its calls' medians."""
    return np.median(steps[:, :, np.asarray(mask)], axis=2).mean(axis=1)


def compose(timings: Sequence[Sequence[Timing]], mask: Sequence[bool], inside: int, outside: int) -> np.ndarray:
    """Return the seconds [rounds] of whole calls, from measured ones that may have fewer steps.

    A whole call is the measured one, with all that happens in it once, and for every further step inside or outside
    the window that call's own median of such steps.

    Args:
        timings: by round and call.
        mask: which steps of a measured call are inside the window.
        inside, outside: how many steps the whole call has there.
    """
    mask = np.asarray(mask)
    more = (inside - int(mask.sum()), outside - int((~mask).sum()))
    totals = []
    for calls in timings:
        seconds = []
        for timing in calls:
            steps = np.asarray(timing.steps)
            extra = [count * np.median(steps[part]) for count, part in zip(more, (mask, ~mask), strict=True) if count]
            seconds.append(timing.seconds + sum(extra))
        totals.append(np.mean(seconds))
    return np.array(totals)


def _rows(
    case: Case,
    schedule: Schedule,
    plans: Mapping[str, tuple[Variant, negtome.NegToMeConfig]],
    timings: Mapping[str, list[list[Timing]]],
    bound: float | None,
    level: float,
) -> list[dict[str, Any]]:
    """Return the rows of a case: by variant and window, and the row of the floor."""
    steps = {name: np.array([[t.steps for t in calls] for calls in rounds]) for name, rounds in timings.items()}
    masks = {name: inside_of(schedule.measured, config.timestep_range) for name, (_, config) in plans.items()}
    masks[PLAIN] = masks[BOUND] = inside_of(schedule.measured, schedule.window)
    windows = [(case.part, window) for window in case.windows]
    windows += [("window", window) for window in case.curve_windows]

    rows = []
    for part, window in windows:
        inside = sum(inside_of(schedule.whole, window))
        counts = (inside, len(schedule.whole) - inside)
        plain = compose(timings[PLAIN], masks[PLAIN], *counts) if timings else None
        for name in [*(case.curve_variants if part == "window" else plans), BOUND]:
            variant, config = plans.get(name, (None, None))
            row: dict[str, Any] = {
                "part": part,
                "variant": name,
                "t_low": window[0],
                "t_high": window[1],
                "steps_inside": inside,
                "rounds": case.rounds,
                "measured_steps": len(schedule.measured),
                "measured_inside": sum(masks[name]),
            }
            if name not in (PLAIN, BOUND):
                row |= {key: getattr(config, key) for key in ("matching", "alpha", "threshold", "cross_attention")}
                row["reference"] = "given image" if variant.picture else config.reference
            if not timings or (name not in timings and name != BOUND):
                rows.append(row | {"call_how": "out of memory"})
                continue
            if name == BOUND:
                own = steps[PLAIN] + np.where(masks[BOUND], bound, 0.0)
                total = plain + inside * bound
            else:
                own = steps[name]
                total = None if variant.outside else compose(timings[name], masks[name], *counts)
            if part != "window":  # which is of whole calls
                row |= {} if name == BOUND else _memory(timings, name)
                row |= _of_steps(name, variant, own, steps[PLAIN], np.array(masks[name]), level)
            if total is not None:
                row |= _summary("call", "s", total)
                row |= {} if name == PLAIN else _ratio("call", total / plain, level, name)
                row["image_s"] = float(np.median(total)) / case.batch
                row["call_how"] = "measured" if schedule.measured == schedule.whole and counts == (
                    sum(masks[name]), len(schedule.measured) - sum(masks[name])
                ) and name != BOUND else "composed"  # fmt: skip
            rows.append(row)
    return rows


def _profile_row(part: latency_profile.Part, rounds: int, schedule: Schedule) -> dict[str, Any]:
    return {
        "part": "profile",
        "variant": METHOD,
        "operation": part.operation,
        "operation_calls": part.calls,
        "host_ms": part.host_ms,
        "device_ms": part.device_ms,
        "rounds": rounds,
        "measured_steps": len(schedule.measured),
        "measured_inside": sum(inside_of(schedule.measured, schedule.window)),
    }


def _of_steps(
    name: str, variant: Variant | None, own: np.ndarray, plain: np.ndarray, inside: np.ndarray, level: float
) -> dict[str, float | None]:
    """Return the columns of the steps [rounds, calls, steps] of a variant, or of the floor, which has no outside."""
    row: dict[str, float | None] = {}
    for where, mask in (("inside", inside), ("outside", ~inside)):
        if (name == BOUND and where == "outside") or (variant and variant.outside and where == "inside"):
            continue
        row |= _summary(where, "ms", own[:, :, mask].ravel() * 1000)
        if name != PLAIN:
            row |= _ratio(where, per_round(own, mask) / per_round(plain, mask), level, name)
    return row


def _summary(name: str, unit: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {f"{name}_{unit}": float(middle), f"{name}_q1_{unit}": float(low), f"{name}_q3_{unit}": float(high)}


def _ratio(what: str, ratios: np.ndarray, level: float, variant: str) -> dict[str, float | None]:
    value, low, high = median_interval(ratios, level)
    if variant == BOUND:  # added to every round alike: what varies over rounds is not what is uncertain of it
        low = high = None
    return {f"{what}_ratio": value, f"{what}_ratio_low": low, f"{what}_ratio_high": high}


def _memory(timings: Mapping[str, list[list[Timing]]], name: str) -> dict[str, float | None]:
    def median(key: str, of: str) -> float | None:
        values = [getattr(timing, key) for calls in timings[of] for timing in calls]
        return None if None in values else float(np.median(values))

    peak, plain = median("peak", name), median("peak", PLAIN)
    return {
        "peak_mib": None if peak is None else peak / 2**20,
        "peak_ratio": None if peak is None or name == PLAIN else peak / plain,
        "pushed_share": median("pushed_share", name),
    }


def _origin(case: Case, cfg: DictConfig, device: str, weights: str) -> dict[str, Any]:
    """Return the columns that all rows of a case share."""
    return {
        "experiment": cfg.name,
        "model": case.model.name,
        "weights": {"random": "random"}.get(weights, "embedded" if case.model.kind == "mini" else "checkpoint"),
        "side": case.side,
        "batch": case.batch,
        "steps": case.model.call.num_inference_steps,
        "dtype": case.model.dtype,
        "compiled": flag(cfg, "compile"),
        **_machine(cfg, device),
        "setting": setting_id(case, cfg, device, weights),
        "commit": current_commit(),
    }


def _machine(cfg: DictConfig, device: str) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name() if device == "cpu" else device,
        "threads": cfg.latency.threads if device == "cpu" else None,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def setting_id(case: Case, cfg: DictConfig, device: str, weights: str) -> str:
    """Return 12 hex digits of all that a measurement depends on: settings, weights, machine, versions and code."""
    model = OmegaConf.to_container(case.model, resolve=True)
    digest = hashlib.sha256()
    for path in CODE:
        digest.update(path.read_bytes())
    identity = {
        "version": LATENCY_VERSION,
        "code": digest.hexdigest(),
        "part": case.part,
        "model": {key: model[key] for key in ("name", "architecture", "source", "dtype", "call", "negtome")},
        "weights": weights,
        "case": [case.side, case.batch, case.rounds, case.steps, case.windows],
        "curve": [case.curve_windows, case.curve_variants],
        "variants": [[v.name, v.via, dict(v.config), v.picture, v.outside] for v in case.variants],
        "compiled": flag(cfg, "compile"),
        "level": cfg.bootstrap.level,
        **_machine(cfg, device),
    }
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put the rows of a case into the CSV at `path`, in place of those of the same configuration.

    Returns:
        The CSV's content, read back.
    """
    frame = read_rows(io.StringIO(_csv(pd.DataFrame(rows, columns=COLUMNS))))
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists():
            old = read_rows(path)
            fresh = set(_configurations(frame))
            kept = old[[key not in fresh for key in _configurations(old)]]
            frame = pd.concat([kept.astype(object), frame.astype(object)], ignore_index=True).infer_objects()
        write_text(path, _csv(frame))
        return read_rows(path)


def read_rows(file: Path | io.StringIO) -> pd.DataFrame:
    """Read `latency.csv`; columns that a table of an earlier version does not have are empty."""
    try:
        return pd.read_csv(file, dtype=TEXT, keep_default_na=False, na_values=[""]).reindex(columns=COLUMNS)
    except ValueError as error:  # pandas' own are ValueErrors
        reason = " ".join(str(error).split())
        raise ValueError(
            f"expected a table in {file}, got a damaged file ({reason}): restore it, or move it away"
        ) from None


def _configurations(frame: pd.DataFrame) -> list[str]:
    """Return each row's `CONFIGURATION` as a text; a table's case makes the curve over the window and a profile too."""
    told = frame[CONFIGURATION].replace({"part": {"window": "table", "profile": "table"}}).astype(object)
    return [
        canonical([f"{value:g}" if isinstance(value, float) else str(value) for value in row])
        for row in told.itertuples(index=False)
    ]


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g")


def run(overrides: Sequence[str]) -> str:
    """Measure what is not in the table yet, write tables and figures, and return the tables as Markdown.

    Raises:
        ValueError: the configuration asks for something that is not measured.
        FileNotFoundError: a checkpoint is not there, or there is nothing to make tables of.
    """
    cfg = _settings(overrides)
    force = flag(cfg, "force")
    if flag(cfg, "offload"):
        raise ValueError("expected offload=false: transfers would be measured, not the method; choose a smaller batch.")
    device = select_device(cfg.device)
    folder = project_path(cfg.results)
    path = folder / f"{cfg.name}.csv"
    for case in configured_cases(overrides):
        setting = setting_id(case, cfg, device, _weights(case.model, cfg.latency.weights))
        there = read_rows(path) if path.exists() else pd.DataFrame(columns=["setting", "part"])
        if not force and ((there["setting"] == setting) & (there["part"] == case.part)).any():
            log.info("%s (%s): measured already", case.label, case.part)
            continue
        merge_rows(path, measure(case, cfg, device))
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: let latency.cases or latency.curves be true.")
    return latency_report.write(read_rows(path), folder, cfg.name, cfg.description)


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(run(argv))
    cfg = _settings(argv)
    for path in latency_report.files(project_path(cfg.results), cfg.name):
        print(path)
