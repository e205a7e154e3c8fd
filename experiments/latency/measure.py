"""Measure a case: its pipeline, every variant in turns, the lower bound and the profile."""

import contextlib
import functools
import gc
import logging
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.benchmark import Timer

import negtome
from experiments.configs import flag
from experiments.latency import clock, profile, random_weights
from experiments.latency.cases import BOUND, METHOD, PLAIN, Case, Variant
from experiments.latency.rows import measured_steps, rows_of, with_bound
from experiments.methods import naive
from experiments.methods.negtome import NegToMe
from experiments.runs import checkpoints
from experiments.runs.identity import current_commit, short_digest

log = logging.getLogger(__name__)

#: Raised whenever the same settings would take another time. A new number, or a new version of a timed method, has
#: every case measured again.
LATENCY_VERSION = 1
#: Seconds for which each kernel of the lower bound is repeated.
REPEATED = 0.05
#: Shapes of the two factors of a batched matrix product.
Product = tuple[tuple[int, int, int], tuple[int, int, int]]


def find_weights(model: DictConfig, wanted: str) -> str:
    """Return the fingerprint of the weights to measure, or "random"; raise where a checkpoint is missing."""
    if wanted not in ("auto", "random", "checkpoint"):
        raise ValueError(f"latency.weights must be auto, random or checkpoint, got {wanted!r}")
    if wanted == "random":
        return "random"
    if wanted == "checkpoint" or model.kind != "real":
        return checkpoints.find_checkpoint(model).fingerprint
    return checkpoints.local_fingerprint(model) or "random"


#: The last pipeline, by its settings: the cases of a suite mostly share theirs.
_loaded: dict[tuple[Any, ...], Any] = {}


def _pipeline(model: DictConfig, weights: str, cfg: DictConfig, device: str) -> Any:
    key = OmegaConf.to_yaml(model, resolve=True), weights, device, cfg.compile
    if key not in _loaded:
        _loaded.clear()  # the device has no room for two of full size
        _free()
        if weights == "random":
            spec = cfg.latency.random[model.architecture]
            pipe = random_weights.build_pipeline(spec, device, getattr(torch, model.dtype))
        else:
            pipe = checkpoints.load(model, checkpoints.find_checkpoint(model), device)
        if flag(cfg, "compile"):
            limits = torch._dynamo.config  # of torch 2.6 under its former name
            name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
            setattr(limits, name, 64)  # every variant compiles its own
            clock.denoiser_of(pipe).compile()
        _loaded[key] = pipe
    return _loaded[key]


def measure_case(case: Case, weights: str, cfg: DictConfig, device: str) -> list[dict[str, Any]]:
    """Measure one case with the weights of `find_weights`; return its rows, without the columns of `origin`.

    Raises:
        ValueError: the steps of the case do not lie on both sides of a timestep range.
    """
    if device == "cpu":
        torch.set_num_threads(cfg.latency.threads)
    pipe = _pipeline(case.model, weights, cfg, device)
    call = _call(case, pipe, weights, cfg)
    steps = steps_of_call = clock.timesteps_of(pipe, call)
    window = case.windows[0]
    if case.steps is not None:
        call["num_inference_steps"] = sum(case.steps)
        steps = clock.timesteps_of(pipe, call)
        window = steps[case.steps[0] - 1], 1000.0
    mask = clock.inside_of(steps, window)
    if mask.all() or not mask.any():
        raise ValueError(f"{case.label}: expected steps in and out of {window}, got {steps}")

    configs = {
        variant.name: case.strengths.replace(
            **{**variant.config, "timestep_range": (steps[0],) * 2 if variant.outside else window}
        )
        for variant in case.variants
    }
    picture = negtome.Reference(torch.rand(3, case.side, case.side, generator=torch.Generator().manual_seed(1)))
    attach = {
        variant.name: functools.partial(attached, pipe, variant, configs[variant.name], picture)
        for variant in case.variants
    }

    def run(name: str) -> clock.Timing:
        with attach[name]() as attachment:
            return clock.time_call(pipe, call, device, attachment)

    names, timings, parts = [name for name in attach if _fits(case, name, run)], {}, pd.DataFrame()
    if PLAIN in names:
        shapes = products(pipe, call, configs[PLAIN], int(mask.sum()))
        timings = clock.take_rounds(names, case.rounds, run, case.label)
        bound = lower_bound(shapes, device, clock.denoiser_of(pipe).dtype)
        timings[BOUND] = with_bound(timings[PLAIN], mask, bound)
        if case.part == "table" and METHOD in names and not cfg.compile:
            once = functools.partial(clock.time_call, pipe, call, device)
            parts = profile.parts(pipe, attach[METHOD], once, case.rounds, device)
    rows = rows_of(case, steps, steps_of_call, configs, timings, cfg.bootstrap.level)
    profiled = {"part": "profile", "variant": METHOD, **measured_steps(case, mask)}
    return [*rows, *(profiled | part for part in parts.reset_index().to_dict("records"))]


def _fits(case: Case, name: str, run: Callable[[str], object]) -> bool:
    """Run a variant once, which also warms up, and tell whether it fits into the device's memory."""
    with contextlib.suppress(torch.OutOfMemoryError):
        run(name)
        return True
    log.warning("%s: %s does not fit into the device's memory", case.label, name)
    _free()  # outside of the block above, for the error's frames hold tensors
    return False


@contextlib.contextmanager
def attached(
    pipe: Any, variant: Variant, config: negtome.NegToMeConfig, picture: negtome.Reference
) -> Iterator[negtome.Attachment | None]:
    """Attach a variant to the pipeline for the length of the block."""
    attach = {
        "plain": contextlib.nullcontext,
        "negtome": lambda: negtome.attach(pipe, config, references=picture if variant.picture else None),
        "naive": lambda: naive.attach(pipe, config),
    }[variant.via]
    with warnings.catch_warnings(), attach() as attachment:
        # Tokens of random weights may all be unlike each other; that costs the same.
        warnings.filterwarnings("ignore", "NegToMe pushed no token", RuntimeWarning)
        yield attachment


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def _call(case: Case, pipe: Any, weights: str, cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of a whole call: of the case's size, and with the model's own number of steps."""
    call = dict(case.model.call) | {"height": case.side, "width": case.side, "num_images_per_prompt": case.batch}
    if weights == "random":
        call.pop("negative_prompt", None)
        spec = cfg.latency.random[case.model.architecture]
        text = random_weights.embeddings(pipe, spec, case.batch, call.get("max_sequence_length"))
        return call | text | {"output_type": "latent"}
    # A composed call has no image at its end; a user waits for a call with images.
    return call | {"prompt": "a photo of a dog", "output_type": "pil" if case.steps is None else "latent"}


def products(pipe: Any, call: Mapping[str, Any], config: negtome.NegToMeConfig, steps: int) -> Counter[Product]:
    """Count the products of one step in the timestep range, of a call with so many such `steps`; costs one call.

    Each product multiplies an attention's image tokens: in each chunk of the batch, those of all images but the first
    by those of the first.
    """
    counts: Counter[Product] = Counter()

    def count(features: torch.Tensor, chunks: int, _: negtome.NegToMeConfig) -> torch.Tensor:
        images, (tokens, channels) = len(features) // chunks, features.shape[1:]
        counts[(chunks, (images - 1) * tokens, channels), (chunks, channels, tokens)] += 1
        return features

    with naive.attach(pipe, config, count):
        pipe(**{**call, "output_type": "latent"})
    return Counter({product: number // steps for product, number in counts.items()})


def lower_bound(counts: Mapping[Product, int], device: str, dtype: torch.dtype) -> float:
    """Measure the least cost of one step in the timestep range, in seconds.

    It has, for every hook point, the bare matrix product, and one pass over memory that reads and writes the tokens
    that move, which are the product's first factor.
    """
    seconds = 0.0
    for shapes, count in counts.items():
        left, right = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
        names = {"bmm": torch.bmm, "left": left, "right": right, "product": left @ right, "moved": left.clone()}
        for work in ("bmm(left, right, out=product)", "moved.copy_(left)"):
            timer = Timer(work, globals=names, num_threads=torch.get_num_threads())
            seconds += count * timer.blocked_autorange(min_run_time=REPEATED).median
    return seconds


def origin(case: Case, cfg: DictConfig, device: str, weights: str) -> dict[str, Any]:
    """Return the columns that all rows of a case share; `setting` digests all that its measurement depends on."""
    cuda = device.startswith("cuda")
    device_name = torch.cuda.get_device_name(device) if cuda else device
    columns = {
        "experiment": cfg.name,
        "model": case.model.name,
        "weights": {"random": "random"}.get(weights, "embedded" if case.model.kind == "mini" else "checkpoint"),
        "side": case.side,
        "batch": case.batch,
        "steps": case.model.call.num_inference_steps,
        "dtype": case.model.dtype,
        "compiled": flag(cfg, "compile"),
        "device": _cpu_name() if device == "cpu" else device_name,
        "threads": cfg.latency.threads if device == "cpu" else None,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }
    model = OmegaConf.to_container(case.model, resolve=True)
    identity = {
        **columns,
        "experiment": None,  # of another name, the same is measured
        "weights": weights,
        "model": {key: model[key] for key in ("name", "architecture", "source", "dtype", "call")},
        "case": repr(replace(case, model=None)),
        "level": cfg.bootstrap.level,
        "code": [LATENCY_VERSION, NegToMe.version, naive.Naive.version],
    }
    return columns | {"setting": short_digest(identity), "commit": current_commit()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
