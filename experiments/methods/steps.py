"""Hooks into the sampling of a stock pipeline: its initial noise, its denoiser's calls, its predictions.

Each is a context manager that restores the pipeline. Rows of a batch are ordered by the halves of guidance, then the
prompts of the call, then the K images of a group.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import generator_of
from experiments.prompts import Group
from negtome.call_inspection import CallReader, DenoiserCall, value_at, with_value
from negtome.encoding import scale_latents
from negtome.sites import find_architecture

Before = Callable[[DenoiserCall, dict[str, Any]], dict[str, Any]]
After = Callable[[DenoiserCall, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object for the length of the block; blocks may be nested."""
    before = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)  # the class has the original
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def denoiser_calls(pipe: Any, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Change the denoiser's arguments and its output, at every call in the block.

    Args:
        pipe: a stock pipeline of `negtome.architectures`.
        before: (call, arguments by name) -> the arguments for the denoiser.
        after: (call, output [rows, ...]) -> the output for the pipeline.

    Raises:
        TypeError: the pipeline's architecture is unknown.
    """
    architecture = find_architecture(pipe)
    denoiser = getattr(pipe, architecture.denoiser)
    names = tuple(inspect.signature(denoiser.forward).parameters)
    reader = CallReader(architecture)
    original = pipe.prepare_latents
    images: int | None = None
    call: DenoiserCall

    @functools.wraps(original)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        nonlocal images, reader
        reader = CallReader(architecture)  # it counts the steps of one call
        prepared = original(*args, **kwargs)
        images = len(prepared[0] if isinstance(prepared, tuple) else prepared)
        return prepared

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        nonlocal call
        arguments = dict(zip(names, args, strict=False)) | kwargs
        call = reader.read(pipe, arguments, images)
        return (), arguments if before is None else before(call, arguments)

    def leave(_: Any, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return output if after is None else (after(call, output[0]), *output[1:])

    with contextlib.ExitStack() as stack:
        stack.callback(denoiser.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(leave).remove)
        stack.enter_context(replaced(pipe, "prepare_latents", prepare_latents))  # its rows are the images
        yield


def some_rows(
    pipe: Any, call: DenoiserCall, arguments: Mapping[str, Any], rows: slice | list[int] | torch.Tensor
) -> dict[str, Any]:
    """Return the denoiser's arguments for some rows of its batch; rows may be repeated."""
    shared = find_architecture(pipe).shared

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pick(key, item) for key, item in value.items()}
        per_row = isinstance(value, torch.Tensor) and value.dim() and len(value) == call.rows and name not in shared
        return value[rows] if per_row else value

    return {name: pick(name, value) for name, value in arguments.items()}


def with_tokens(
    denoiser: DenoiserCall, arguments: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the denoiser's arguments with other text tokens in the rows that are conditioned on the prompt.

    Pooled embeddings stay.

    Args:
        denoiser: the call.
        arguments: of the call, by name.
        change: tokens [images, L, C], padded with zeros -> tokens of the same shape and dtype.
    """
    for name, prompt in denoiser.prompts.items():
        if "mask" in name or prompt.dim() < 3:
            continue
        # Krea 2 has several layers' features of each token.
        tokens = prompt.expand(denoiser.rows, *prompt.shape[1:]).flatten(2)
        chunks = list(tokens.chunk(denoiser.cfg_chunks))
        for index in denoiser.conditional:
            chunks[index] = change(chunks[index])
        changed = torch.cat(chunks).unflatten(2, prompt.shape[2:])
        texts = value_at(arguments, name)
        if isinstance(texts, list):
            changed = [row[: len(text)] for row, text in zip(changed, texts, strict=True)]
        arguments = with_value(arguments, name, changed)
    return arguments


def drawn_once(
    group: Group, name: str, draw: Callable[[torch.Size, torch.Generator], tuple[torch.Tensor, ...]]
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return a function: tokens [groups * K, L, C] -> random tensors of their shape, the same in every step and group.

    Args:
        group: of K images.
        name: of the random numbers.
        draw: (shape [K, L, C], generator on the CPU) -> tensors of that shape.
    """
    drawn: dict[tuple[torch.Size, torch.device], tuple[torch.Tensor, ...]] = {}

    def noise_for(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key = tokens.shape, tokens.device
        if key not in drawn:
            shape = torch.Size((group.size, *tokens.shape[1:]))
            parts = draw(shape, generator_of(group, f"{name} {len(drawn)}"))
            drawn[key] = tuple(part.repeat(len(tokens) // group.size, 1, 1).to(tokens.device) for part in parts)
        return drawn[key]

    return noise_for


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert float32 values to a dtype; values out of range become the largest finite number."""
    limits = torch.finfo(dtype)
    return values.clamp(limits.min, limits.max).to(dtype)


@dataclass(frozen=True)
class Prediction:
    """The prediction of a step, sample = signal * clean + noise * n with n of unit variance.

    Attributes:
        clean: [rows, ...] the predicted clean latents, float32, after guidance, packed if the pipeline packs them.
        sample: [rows, ...] the noisy latents.
        signal, noise: 1 and sigma of Euler's schedulers, sqrt(abar) and sqrt(1 - abar) of DDIM, 1 - t and t of flows.
        timestep: in training timesteps, 1000 = pure noise.
    """

    clean: torch.Tensor
    sample: torch.Tensor
    signal: float
    noise: float
    timestep: float

    @property
    def sigma(self) -> float:
        """Noise over signal, EDM's noise level; infinite for pure noise."""
        return self.noise / self.signal if self.signal else math.inf


@contextlib.contextmanager
def predictions(pipe: Any, change: Callable[[Prediction], torch.Tensor]) -> Iterator[None]:
    """Replace the clean latents that each step predicts; if `change` returns them unchanged, so is the step.

    Args:
        pipe: a stock pipeline.
        change: prediction -> clean latents, of the same shape.

    Raises:
        ValueError: the scheduler, or its prediction type, is unknown.
    """
    scheduler = pipe.scheduler
    levels(scheduler)  # before anything is generated

    @functools.wraps(scheduler.step)
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        signal, noise = levels(scheduler, timestep)
        output, noisy = model_output.float(), sample.float()
        clean, slope = _clean(scheduler, signal, noise, noisy, output)
        changed = change(Prediction(clean, noisy, signal, noise, float(timestep)))
        if changed is not clean:
            model_output = (output + slope * (changed - clean)).to(model_output.dtype)
        return original(model_output, timestep, sample, *args, **kwargs)

    original = scheduler.step
    with replaced(scheduler, "step", step):
        yield


def clean_of_call(
    pipe: Any, call: DenoiserCall, arguments: Mapping[str, Any], output: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the clean latents, float32, that a denoiser's output predicts, and the output's slope in them.

    Args:
        pipe: a stock pipeline with a scheduler that `levels` supports.
        call: of the denoiser.
        arguments: the denoiser's, by name.
        output: [rows, ...] of the denoiser.
    """
    signal, noise = levels(pipe.scheduler, call.time)
    # Euler's schedulers scale the denoiser's input to unit variance; the others need no scaling.
    norm = 1.0 if _is_flow(pipe.scheduler) else math.hypot(signal, noise)
    noisy = norm * arguments[find_architecture(pipe).sample].float()
    return _clean(pipe.scheduler, signal, noise, noisy, output.float())


def _clean(
    scheduler: Any, signal: float, noise: float, noisy: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the clean latents that an output predicts, and the output's slope in them."""
    norm = math.hypot(signal, noise)
    kind = "flow_prediction" if _is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return (noisy - noise * output) / signal, -signal / noise
    if kind == "v_prediction":
        return (signal / norm * noisy - noise * output) / norm, -norm / noise
    if kind == "flow_prediction":
        return noisy - noise * output, -1 / noise
    return output, 1.0


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)


def levels(scheduler: Any, timestep: Any = None) -> tuple[float, float]:
    """Return (signal, noise) of a step, as of `Prediction`; by default of the first step.

    Raises:
        ValueError: the scheduler is unknown.
    """
    name = type(scheduler).__name__
    if hasattr(scheduler, "sigmas"):
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
        if index is None:
            index = 0 if timestep is None else scheduler.index_for_timestep(timestep)
        sigma = float(scheduler.sigmas[index])
        if _is_flow(scheduler):
            return 1 - sigma, sigma
        if name.startswith(("Euler", "Heun")):
            return 1.0, sigma
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
    elif name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"):
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[0] if timestep is None else timestep)])
        return math.sqrt(alpha), math.sqrt(1 - alpha)
    raise ValueError(
        f"expected a scheduler whose noise levels are known here, got {name}: choose EulerDiscreteScheduler, "
        "DDIMScheduler, DPMSolverMultistepScheduler, or FlowMatchEulerDiscreteScheduler for flow models"
    )


def unpacked(pipe: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return latents, packed or not, as [rows, c, h, w]; height and width are the images', in pixels."""
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor) if latents.dim() == 3 else latents


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode clean latents [n, c, h, w] as the pipeline does: float [n, H, W, 3] in [0, 1], on the CPU."""
    architecture, vae = find_architecture(pipe), pipe.vae
    zero, one = (scale_latents(architecture, pipe, torch.full_like(latents, value)) for value in (0, 1))
    latents = (latents - zero) / (one - zero)  # scaling is affine
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if upcast:
            vae.to(dtype=torch.float32)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
    return pipe.image_processor.postprocess(images, output_type="pt").float().cpu().permute(0, 2, 3, 1)


@contextlib.contextmanager
def initial_noise(pipe: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the pipeline's initial noise; if `change` returns it unchanged, the images are bit-identical.

    Args:
        pipe: a stock pipeline.
        change: noise [rows, c, h, w] of unit variance, unpacked -> noise of the same shape.
    """
    original = pipe.prepare_latents
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        arguments = parameters.bind(*args, **kwargs).arguments
        prepared = original(*args, **kwargs)
        latents, *rest = prepared if isinstance(prepared, tuple) else (prepared,)
        packed, scale = latents.dim() == 3, getattr(pipe.scheduler, "init_noise_sigma", 1.0)
        noise = latents / scale
        if packed:
            noise = unpacked(pipe, noise, arguments["height"], arguments["width"])
        changed = change(noise)
        if changed is noise:
            return prepared
        latents = scale * (pipe._pack_latents(changed, *changed.shape) if packed else changed)
        return (latents, *rest) if rest else latents

    with replaced(pipe, "prepare_latents", prepare_latents):
        yield
