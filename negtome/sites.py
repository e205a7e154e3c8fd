"""The facts about diffusers: which modules carry image tokens, how a denoiser is called, in which units.

This is the only file that knows diffusers' module names, argument names and units of time. Everything is matched by
name, so nothing of diffusers is imported. A further architecture is a further row in `ARCHITECTURES`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from negtome.config import NegToMeConfig


@dataclass(frozen=True)
class Place:
    """A kind of site: where in a denoiser the image tokens of an attention can be had.

    Attributes:
        pattern: the modules' names in the denoiser, with * as a wildcard.
        where: "output" or "input" (its first argument) of the module.
        cross: whether these are outputs of attention to the text.
        text_first: whether the tokens of the text stand before those of the image.
    """

    pattern: str
    where: Literal["output", "input"]
    cross: bool = False
    text_first: bool = False


@dataclass(frozen=True)
class DenoiserCall:
    """What one call of the denoiser says about itself.

    Attributes:
        timestep: in training timesteps, 1000 = pure noise, as the pipeline holds it; see `Timesteps`.
        rows: images in the batch, all halves included.
        halves: parts of the batch that hold the same images, one after the other: 2 for unconditional and
            conditional in one batch, else 1.
        prompts: [rows, T, D] the text embedding of every row, or [1, T, D] of all.
        pooled: [rows, P] the pooled text embedding, or [1, P]. Flux's is of `prompt`, the other of `prompt_2`.
        text_length: text tokens in front of the image tokens where a place has `text_first`.
        latent: (height, width) of the latent where feature maps of several sizes exist, else None.
    """

    timestep: torch.Tensor | float
    rows: int
    halves: int
    prompts: torch.Tensor
    pooled: torch.Tensor
    text_length: int
    latent: tuple[int, int] | None


@dataclass(frozen=True)
class Architecture:
    """One row of the table: an architecture that NegToMe can be attached to.

    Attributes:
        name: as in `NegToMeConfig.preset`, which has it in lower case.
        pipeline: name of the pipeline class (subclasses included).
        denoiser: the pipeline's attribute that holds the denoiser.
        denoiser_class: name of its class.
        blocks: the blocks that the release touches, used where the config does not say.
        places: the kinds of sites.
        read: reads a call of the denoiser from the pipeline and the denoiser's arguments by name.
        sample: name of the argument that holds the latents.
        shared: names of the arguments that have no row for each image.
        broadcast: names of the arguments that may have a single row for all images, as the caller gave it.
        guided_apart: whether guidance is a second call of the denoiser in a step, for the negative prompt.
        latent_size: (height, width) of the latent, before any packing, from the denoiser's arguments.
        grids: sizes (height, width) in tokens of the feature maps of a latent, large to small.
        scale: the autoencoder's latents [R, c, h, w] -> as the pipeline denoises them.
        pack: latents or noise [R, c, h, w] -> as the denoiser takes them.
        noised: clean latents, noise and the denoiser's arguments -> what the denoiser gets at this step, float32.
        embed: a prompt -> the denoiser's arguments that hold it, nested as there.
    """

    name: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    blocks: tuple[str, ...]
    places: tuple[Place, ...]
    read: Callable[[Any, Mapping[str, Any]], DenoiserCall]
    sample: str
    shared: tuple[str, ...]
    broadcast: tuple[str, ...]
    guided_apart: bool
    latent_size: Callable[[Mapping[str, Any]], tuple[int, int]]
    grids: Callable[[tuple[int, int]], list[tuple[int, int]]]
    scale: Callable[[Any, torch.Tensor], torch.Tensor]
    pack: Callable[[Any, torch.Tensor], torch.Tensor]
    noised: Callable[[Any, torch.Tensor, torch.Tensor | None, Mapping[str, Any]], torch.Tensor]
    embed: Callable[[Any, str, Mapping[str, Any]], dict[str, Any]]


class Timesteps:
    """Read the timestep of each call of the denoiser, without waiting for the device at every one.

    A pipeline loops over the tensor `scheduler.timesteps`, so the timestep it hands on is a view of one element, and
    where it lies in memory says which. The values are fetched once. Whatever is no such view is fetched itself.
    """

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None  # kept, so that no other tensor gets its memory
        self._version: int | None = None
        self._values: list[float] = []
        self.schedule: list[float] = []  # of the pipeline's whole loop, as far as it is known

    def read(self, pipe: Any, timestep: torch.Tensor | float) -> float:
        """Return a timestep that `pipe` handed on.

        Raises:
            ValueError: it, or another of the schedule, is no training timestep.
        """
        known = getattr(pipe.scheduler, "timesteps", None)
        tensors = isinstance(timestep, torch.Tensor) and isinstance(known, torch.Tensor)
        number = _number_in(known, timestep) if tensors else None
        if number is None:
            _check_unit(pipe.scheduler, value := float(timestep))
            return value
        version = None if known.is_inference() else known._version  # which writing to it changes
        if known is not self._known or version != self._version:
            self._known, self._version, self._values = known, version, known.tolist()
            self.schedule = self._values[: pipe.num_timesteps]  # denoising_end leaves the last ones out
            _check_unit(pipe.scheduler, *self._values)
        return float(self._values[number])


def _check_unit(scheduler: Any, *timesteps: float) -> None:
    """Refuse what cannot be training timesteps, of which a window is made."""
    if not all(-1e-3 <= timestep <= 1000 + 1e-3 for timestep in timesteps):
        raise ValueError(
            f"NegToMe's window is in training timesteps, from 0 to 1000, but the timesteps of this "
            f"{type(scheduler).__name__} go from {min(timesteps):g} to {max(timesteps):g} (EDM's are logarithms of the "
            "noise level); choose a scheduler in training timesteps, such as EulerDiscreteScheduler."
        )


def _number_in(values: torch.Tensor, value: torch.Tensor) -> int | None:
    """Tell which element of a list of values [n] a tensor of one element is a view of, if any."""
    if values.dim() != 1 or value.numel() != 1 or value.dtype != values.dtype or values.stride(0) < 1:
        return None
    if value.device != values.device or value.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    number, between = divmod(value.storage_offset() - values.storage_offset(), values.stride(0))
    return number if not between and 0 <= number < len(values) else None


def _read_sdxl(pipe: Any, arguments: Mapping[str, Any]) -> DenoiserCall:
    """Read a call of SDXL's UNet: time in training timesteps, guidance as one batch [unconditional, conditional]."""
    sample = arguments["sample"]  # [rows, 4, height, width]
    return DenoiserCall(
        timestep=arguments["timestep"],
        rows=sample.shape[0],
        halves=2 if pipe.do_classifier_free_guidance else 1,
        prompts=arguments["encoder_hidden_states"],
        pooled=arguments["added_cond_kwargs"]["text_embeds"],
        text_length=0,
        latent=(sample.shape[-2], sample.shape[-1]),
    )


def _sdxl_scale(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scale latents [R, 4, h, w] as SDXL's pipelines do."""
    config = pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        latents = (latents - mean) / std
    return latents * config.scaling_factor


def _sdxl_noised(
    pipe: Any, latents: torch.Tensor, noise: torch.Tensor | None, arguments: Mapping[str, Any]
) -> torch.Tensor:
    """Noise latents [R, 4, h, w] to the step's level by the pipeline's scheduler, and scale them as it does."""
    scheduler, timestep = pipe.scheduler, arguments["timestep"].reshape(-1)[:1]
    if noise is not None:
        between = any(hasattr(scheduler, name) for name in ("sigmas_interpol", "mid_point_sigma"))
        if between and not scheduler.state_in_first_order:
            # A step of KDPM2 or DPM-Solver-SDE between two of the schedule, whose level add_noise does not know: the
            # one that 1 is scaled by, 1 / sqrt(sigma^2 + 1).
            scale = scheduler.scale_model_input(latents.new_ones((), dtype=torch.float64), timestep[0])
            latents = latents + (1 / scale**2 - 1).sqrt().to(latents) * noise
        else:
            latents = scheduler.add_noise(latents, noise, timestep)
    return scheduler.scale_model_input(latents, timestep[0])


def _sdxl_embed(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Embed a prompt as SDXL's UNet takes it, with the call's clip_skip: tokens [1, T, D] and pooled [1, P].

    Raises:
        ValueError: the call's embeddings have more or fewer tokens, which the pipeline cannot make of a prompt.
    """
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, clip_skip=pipe.clip_skip)
    expected = arguments["encoder_hidden_states"].shape[1]
    if tokens.shape[1] != expected:
        raise ValueError(
            f"NegToMe expected text embeddings of {tokens.shape[1]} tokens, as those of a Reference's prompt, got "
            f"{expected}; shorten the prompts, or leave that prompt out, and each image lends its own."
        )
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled}}


def _read_flux(pipe: Any, arguments: Mapping[str, Any]) -> DenoiserCall:
    """Read a call of Flux's transformer: true guidance is a second call, so a batch is never halved."""
    prompts = arguments["encoder_hidden_states"]
    return DenoiserCall(
        # The transformer gets t / 1000 in the dtype of the latents: in bfloat16 that is off by up to 4 timesteps, and
        # 900 arrives as 898. The pipeline keeps the scheduler's own value.
        timestep=pipe.current_timestep,
        rows=arguments["hidden_states"].shape[0],
        halves=1,
        prompts=prompts,
        pooled=arguments["pooled_projections"],
        text_length=prompts.shape[1],
        latent=None,
    )


def _flux_latent_size(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Read the latent's size from the positions of the image tokens, each of which is 2 x 2 of it."""
    rows, columns = arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(dim=0).tolist()  # from 0
    return 2 * (int(rows) + 1), 2 * (int(columns) + 1)


def _flux_scale(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Shift and scale latents [R, 16, h, w] as Flux's pipelines do."""
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def _flux_noised(
    pipe: Any, latents: torch.Tensor, noise: torch.Tensor | None, arguments: Mapping[str, Any]
) -> torch.Tensor:
    """Noise packed latents [R, N, 64] to the step's level: (1 - sigma) latents + sigma noise."""
    if noise is None:
        return latents
    scheduler, timestep = pipe.scheduler, pipe.current_timestep.reshape(-1)[:1]
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(latents, timestep, noise)
    return scheduler.add_noise(latents, noise, timestep)  # as of UniPC with flow sigmas


def _flux_embed(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Embed a prompt as Flux's transformer takes it: tokens [1, T, D], as many as the call's, and pooled [1, P]."""
    length = arguments["encoder_hidden_states"].shape[1]
    tokens, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=length)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def feature_maps(latent: tuple[int, int]) -> list[tuple[int, int]]:
    """List the sizes (height, width) of a UNet's feature maps, large to small: every level halves, rounding up."""
    sizes = [latent]
    while max(sizes[-1]) > 1:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def largest_map(denoiser: torch.nn.Module, names: Sequence[str], latent: tuple[int, int]) -> tuple[int, int]:
    """Return the size (height, width) of the largest feature map that any of these modules of a UNet works on."""
    lowest = len(denoiser.down_blocks) - 1

    def level(name: str) -> int:
        part, number, *_ = name.split(".")
        return lowest if part == "mid_block" else int(number) if part == "down_blocks" else lowest - int(number)

    maps = feature_maps(latent)
    return maps[min(*map(level, names), len(maps) - 1)]


def fewest_tokens(latent: tuple[int, int], min_side: int) -> int:
    """Count the tokens of the smallest feature map whose sides are both at least `min_side`."""
    return min(height * width for height, width in feature_maps(latent) if min(height, width) >= min_side)


ARCHITECTURES = (
    Architecture(
        name="SDXL",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        blocks=("up_blocks",),
        places=(
            # After the output projection, as in the release.
            Place("*.attn1", "output"),
            Place("*.attn2", "output", cross=True),
        ),
        read=_read_sdxl,
        sample="sample",
        shared=("timestep",),
        broadcast=(),
        guided_apart=False,
        latent_size=lambda arguments: tuple(arguments["sample"].shape[-2:]),
        grids=feature_maps,
        scale=_sdxl_scale,
        pack=lambda pipe, latents: latents,
        noised=_sdxl_noised,
        embed=_sdxl_embed,
    ),
    Architecture(
        name="Flux",
        pipeline="FluxPipeline",
        denoiser="transformer",
        denoiser_class="FluxTransformer2DModel",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        places=(
            # Before the output projection, as in the release. Text and image have been separated here.
            Place("transformer_blocks.*.attn.to_out.0", "input"),
            # These attentions have no output projection: their output is text and image together.
            Place("single_transformer_blocks.*.attn", "output", text_first=True),
        ),
        read=_read_flux,
        sample="hidden_states",
        shared=("img_ids", "txt_ids"),
        broadcast=("encoder_hidden_states", "pooled_projections"),
        guided_apart=True,
        latent_size=_flux_latent_size,
        grids=lambda latent: [(latent[0] // 2, latent[1] // 2)],
        scale=_flux_scale,
        pack=lambda pipe, latents: pipe._pack_latents(latents, *latents.shape),
        noised=_flux_noised,
        embed=_flux_embed,
    ),
)


def find_architecture(pipe: Any) -> Architecture:
    """Find the row for a pipeline.

    Raises:
        TypeError: if the pipeline is not supported.
    """
    names = {cls.__name__ for cls in type(pipe).__mro__}
    for architecture in ARCHITECTURES:
        denoiser = unwrap(getattr(pipe, architecture.denoiser, None))
        classes = {cls.__name__ for cls in type(denoiser).__mro__}
        if architecture.pipeline in names and architecture.denoiser_class in classes:
            return architecture
    supported = ", ".join(f"{a.pipeline} with a {a.denoiser_class}" for a in ARCHITECTURES)
    raise TypeError(f"NegToMe cannot be attached to a {type(pipe).__name__}; supported are {supported}.")


def calling_pipeline() -> Any:
    """Return the pipeline that the caller is called by, the innermost one on the stack, or None.

    Several pipelines may share a denoiser, and a callback of one may call another.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if any(cls.__name__ == "DiffusionPipeline" for cls in type(owner).__mro__):
                return owner
        frame = frame.f_back
    return None


def unwrap(denoiser: Any) -> Any:
    """Return the module inside what torch.compile(module) returned, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def check_denoiser(denoiser: torch.nn.Module, adds_rows: bool) -> None:
    """Refuse a denoiser in which NegToMe would silently do something else.

    Args:
        denoiser: the module itself.
        adds_rows: whether its batch has more rows in some steps than in others.

    Raises:
        RuntimeError: it is split over several processes, so that each has a part of the tokens or channels; or a hook
            of diffusers carries features from one step to the next (a cache), and the rows change.
    """
    split = any(type(parameter).__name__ == "DTensor" for parameter in denoiser.parameters())
    if split or getattr(denoiser, "_parallel_config", None) is not None:
        raise RuntimeError(
            f"NegToMe compares whole tokens, but this {type(denoiser).__name__} is split over processes "
            "(context or tensor parallelism, or sharded parameters); load it whole in each process, and give each "
            "process groups of its own."
        )
    for name, module in denoiser.named_modules() if adds_rows else ():
        for hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values():
            if hook._is_stateful:
                raise RuntimeError(
                    "NegToMe adds the rows of a Reference in the steps of its window only, but a cache, the "
                    f"{type(hook).__name__} on {name or 'the denoiser'}, keeps features from one step to the next; "
                    f"call disable_cache() on the {type(denoiser).__name__}, or leave the Reference out."
                )


def find_sites(
    denoiser: torch.nn.Module, architecture: Architecture, config: NegToMeConfig
) -> list[tuple[str, torch.nn.Module, Place]]:
    """Find the modules to touch in a denoiser, in its own order: (name, module, kind).

    Raises:
        ValueError: if a block holds no site.
    """
    blocks = architecture.blocks if config.sites is None else config.sites
    places = [place for place in architecture.places if config.cross_attention or not place.cross]
    found = [
        (name, module, place)
        for name, module in denoiser.named_modules()
        for place in places
        if fnmatchcase(name, place.pattern) and any(_within(name, block) for block in blocks)
    ]
    for block in blocks:
        if not any(_within(name, block) for name, _, _ in found):
            top = ", ".join(dict.fromkeys(name for name, _ in denoiser.named_children()))
            raise ValueError(
                f"NegToMe found no site under {block!r} of the {type(denoiser).__name__}: it looked for modules "
                f"named {' or '.join(place.pattern for place in places)}; choose sites among {top}."
            )
    return found


def _within(name: str, block: str) -> bool:
    """Tell whether a dotted module name is a block's, or lies inside it."""
    return name == block or name.startswith(block + ".")
