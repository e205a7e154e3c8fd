"""The architectures that NegToMe supports, as a table of diffusers' names and units.

To add an architecture, add a row to `ARCHITECTURES`; to add a pipeline, add its name to a row. Both need a tiny
pipeline in the tests. Everything is matched by name, so this module does not import diffusers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class HookPoint:
    """A kind of module in a denoiser that passes the image tokens of an attention.

    Attributes:
        pattern: names of the modules in the denoiser, with * as a wildcard.
        tensor: what is changed: the "output" of the module, or its "input" (the first argument). If an output is a
            tuple, its first item.
        cross: whether this is the output of attention to the text.
        image: position of the image tokens: "all" (no other tokens), "first", or "last" (after the text). Tokens of the
            generated image come before those of input images.
        width: attribute of the module's parent that counts the leading channels with features; None if all channels.
    """

    pattern: str
    tensor: Literal["output", "input"]
    cross: bool = False
    image: Literal["all", "first", "last"] = "all"
    width: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Names of denoiser arguments may lead into mappings, such as "added_cond_kwargs.text_embeds".

    Attributes:
        name: as in `NegToMeConfig.preset`, which has it in lower case.
        pipelines: names of the pipeline classes; subclasses are supported too.
        denoiser_class: name of the denoiser's class.
        blocks: blocks that take part by default.
        hook_points: kinds of modules to hook.
        prompts: denoiser arguments that hold the text, in the order in which `encode_prompt` returns their values; None
            for a value that is not a denoiser argument.
        guidance: "batch": one batch [unconditional, conditional], then whatever else is conditioned on the prompt
            (perturbed attention). "batch, reversed": [conditional, unconditional]. "calls": two calls of the denoiser,
            the conditional one first; or no guidance. "guider": a call for each of the conditions of a modular guider.
        grid: denoiser arguments -> (height, width) of the generated image in tokens, on the largest feature map; for
            videos (frames, height, width).
        denoiser: attribute of the pipeline that holds the denoiser.
        sample: argument that holds the latents, [rows, c, h, w], [rows, c, F, h, w] or packed [rows, N, C]. Input
            images may be in further channels or tokens.
        time: argument that holds the time.
        timestep_scale: value of that argument -> training timesteps, 1000 = pure noise. Used when the scheduler does
            not know the step.
        shared: arguments without a row for each image, whatever their shape.
        levels: whether the denoiser has smaller feature maps too, each half as high and wide.
        patch: side of a token in the latent.
        shuffles_text_mask: text masks that the pipeline assigns to the wrong images when a call has several prompts
            and several images of each.
        drops_text_padding: text mask, if the denoiser drops padding. Image tokens then begin where the text ends, so
            all texts of a call must have the same length.
        scale: (pipeline, latents [R, c, h, w] of the autoencoder) -> latents as they are denoised; None to use the
            numbers in the autoencoder's config.
        pack: (pipeline, scaled latents or noise) -> what the denoiser takes; None if unchanged.
        frames: whether the autoencoder expects videos: [R, 3, 1, H, W] -> [R, c, 1, h, w].
        video: whether the output is a video. Its frames are pushed as one image. Experimental; takes no references.
        list_inputs: whether latents, text and output are lists with a tensor for each row.
        modular: name of each ModularPipeline of diffusers -> name of the stock pipeline that encodes references as it
            does, with the same components.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser_class: str
    blocks: tuple[str, ...]
    hook_points: tuple[HookPoint, ...]
    prompts: tuple[str | None, ...]
    guidance: Literal["batch", "batch, reversed", "calls", "guider"]
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    denoiser: str = "transformer"
    sample: str = "hidden_states"
    time: str = "timestep"
    timestep_scale: Callable[[float], float] = float
    shared: tuple[str, ...] = ()
    levels: bool = False
    patch: int = 1
    shuffles_text_mask: tuple[str, ...] = ()
    drops_text_padding: str | None = None
    scale: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    pack: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    frames: bool = False
    video: bool = False
    list_inputs: bool = False
    modular: Mapping[str, str] = field(default_factory=dict)

    @property
    def per_prompt(self) -> str:
        """Return the pipeline argument that sets how many images (or videos) each prompt has."""
        return "num_videos_per_prompt" if self.video else "num_images_per_prompt"


def _grid_from_ids(name: str) -> Callable[[Mapping[str, Any]], tuple[int, int]]:
    """Read the grid from an argument [.., N, 3 or 4] with the image number, row and column of every image token."""

    def grid(arguments: Mapping[str, Any]) -> tuple[int, int]:
        ids = arguments[name].flatten(end_dim=-2)
        height, width = (ids[ids[:, 0] == 0, 1:3].amax(dim=0) + 1).tolist()  # the generated image's number is 0
        return int(height), int(width)

    return grid


def _grid_from_shape(name: str, patch: int) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """Read the grid from an argument [rows, c, (F,) h, w], in which a token covers patch x patch elements."""

    def grid(arguments: Mapping[str, Any]) -> tuple[int, ...]:
        *frames, height, width = arguments[name].shape[2:]
        return *frames, height // patch, width // patch

    return grid


def _from_unit_interval(time: float) -> float:
    return 1000 * time


def _from_remaining(time: float) -> float:
    return 1000 * (1 - time)


def _pack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Put 2x2 patches of latents [R, c, h, w] into tokens, as the pipeline does."""
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def _patchify_and_normalize(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Put 2x2 patches of latents into their channels, and scale these by the statistics of the autoencoder."""
    mean, variance = (values.to(latents) for values in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    epsilon = pipe.vae.config.batch_norm_eps
    return torch.nn.functional.batch_norm(pipe._patchify_latents(latents), mean, variance, eps=epsilon)


_UNET: dict[str, Any] = {
    "denoiser": "unet",
    "denoiser_class": "UNet2DConditionModel",
    "blocks": ("up_blocks",),
    "hook_points": (
        # After the output projection, as in the release for SDXL.
        HookPoint("*.attn1", "output"),
        HookPoint("*.attn2", "output", cross=True),
    ),
    "guidance": "batch",
    "sample": "sample",
    "grid": _grid_from_shape("sample", 1),
    "levels": True,
}

_FLUX: dict[str, Any] = {
    "blocks": ("transformer_blocks", "single_transformer_blocks"),
    "hook_points": (
        # Before the output projection, as in the release. Text and image have been separated here.
        HookPoint("transformer_blocks.*.attn.to_out.0", "input", image="first"),
        # These attentions have no output projection: their output is text and image together.
        HookPoint("single_transformer_blocks.*.attn", "output", image="last"),
    ),
    "guidance": "calls",  # true guidance
    "timestep_scale": _from_unit_interval,
    "shared": ("img_ids", "txt_ids"),
    "grid": _grid_from_ids("img_ids"),
    "patch": 2,
    "pack": _pack,
}

ARCHITECTURES = (
    Architecture(
        name="SDXL",
        pipelines=(
            "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline", "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLPAGPipeline", "StableDiffusionXLAdapterPipeline",
        ),
        modular={"StableDiffusionXLModularPipeline": "StableDiffusionXLPipeline"},
        prompts=("encoder_hidden_states", None, "added_cond_kwargs.text_embeds", None),
        **_UNET,
    ),
    Architecture(
        name="SD1.5",
        pipelines=(
            "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
        ),
        prompts=("encoder_hidden_states", None),
        **_UNET,
    ),
    Architecture(
        name="Flux",
        pipelines=(
            "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxControlPipeline",
            "FluxControlNetPipeline", "FluxKontextPipeline",
        ),
        denoiser_class="FluxTransformer2DModel", prompts=("encoder_hidden_states", "pooled_projections", None),
        modular={"FluxModularPipeline": "FluxPipeline", "FluxKontextModularPipeline": "FluxKontextPipeline"},
        **_FLUX,
    ),
    Architecture(
        name="SD3",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        denoiser_class="SD3Transformer2DModel", blocks=("transformer_blocks",),
        hook_points=(
            HookPoint("transformer_blocks.*.attn.to_out.0", "input"),
            # Of SD3.5 medium: a second attention of the images to themselves.
            HookPoint("transformer_blocks.*.attn2.to_out.0", "input"),
        ),
        prompts=("encoder_hidden_states", None, "pooled_projections", None), guidance="batch",
        grid=_grid_from_shape("hidden_states", 2), patch=2,
        modular={"StableDiffusion3ModularPipeline": "StableDiffusion3Pipeline"},
    ),
    Architecture(
        name="Chroma",
        pipelines=("ChromaPipeline",),
        denoiser_class="ChromaTransformer2DModel",
        # The pipeline lengthens the mask by the tokens of the image.
        prompts=("encoder_hidden_states", None, "attention_mask", None, None, None),
        **_FLUX,
    ),
    Architecture(
        name="PixArt",
        pipelines=("PixArtSigmaPipeline",),
        denoiser_class="PixArtTransformer2DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None), guidance="batch",
        grid=_grid_from_shape("hidden_states", 2), patch=2,
    ),
    Architecture(
        name="Sana",
        pipelines=("SanaPipeline",),
        denoiser_class="SanaTransformer2DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        shuffles_text_mask=("encoder_attention_mask",), guidance="batch", grid=_grid_from_shape("hidden_states", 1),
    ),
    Architecture(
        name="AuraFlow",
        pipelines=("AuraFlowPipeline",),
        denoiser_class="AuraFlowTransformer2DModel",
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        hook_points=(
            HookPoint("joint_transformer_blocks.*.attn.to_out.0", "input"),
            # Behind registers and the text.
            HookPoint("single_transformer_blocks.*.attn.to_out.0", "input", image="last"),
        ),
        prompts=("encoder_hidden_states", None, None, None), guidance="batch", timestep_scale=_from_unit_interval,
        grid=_grid_from_shape("hidden_states", 2), patch=2,
    ),
    Architecture(
        name="CogView4",
        pipelines=("CogView4Pipeline",),
        denoiser_class="CogView4Transformer2DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn1.to_out.0", "input", image="last"),),
        prompts=("encoder_hidden_states", None), guidance="calls", grid=_grid_from_shape("hidden_states", 2),
        patch=2,
    ),
    Architecture(
        name="Flux2",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        denoiser_class="Flux2Transformer2DModel", blocks=("transformer_blocks", "single_transformer_blocks"),
        hook_points=(
            HookPoint("transformer_blocks.*.attn.to_out.0", "input", image="first"),
            # These project [attention, MLP] together.
            HookPoint("single_transformer_blocks.*.attn.to_out", "input", image="last", width="inner_dim"),
        ),
        prompts=("encoder_hidden_states", None),
        guidance="calls",  # klein's; dev has its own embedded
        timestep_scale=_from_unit_interval, grid=_grid_from_ids("img_ids"), patch=2, scale=_patchify_and_normalize,
        pack=lambda pipe, latents: pipe._pack_latents(latents),
        modular={
            "Flux2ModularPipeline": "Flux2Pipeline", "Flux2KleinModularPipeline": "Flux2KleinPipeline",
            "Flux2KleinBaseModularPipeline": "Flux2KleinPipeline",
        },
    ),
    Architecture(
        name="Qwen",
        pipelines=(
            "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
        ),
        denoiser_class="QwenImageTransformer2DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn.to_out.0", "input", image="first"),),
        prompts=("encoder_hidden_states", "encoder_hidden_states_mask"), guidance="calls",
        timestep_scale=_from_unit_interval, shared=("img_shapes",),
        grid=lambda arguments: tuple(arguments["img_shapes"][0][0][1:]), patch=2, pack=_pack, frames=True,
        modular={
            "QwenImageModularPipeline": "QwenImagePipeline", "QwenImageEditModularPipeline": "QwenImageEditPipeline",
            "QwenImageEditPlusModularPipeline": "QwenImageEditPlusPipeline",
        },
        shuffles_text_mask=("encoder_hidden_states_mask",),
    ),
    Architecture(
        name="ZImage",
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        denoiser_class="ZImageTransformer2DModel", blocks=("noise_refiner", "layers"),
        hook_points=(
            # The image, padded to a multiple of 32 tokens, and in the layers the text behind it.
            HookPoint("noise_refiner.*.attention.to_out.0", "input", image="first"),
            HookPoint("layers.*.attention.to_out.0", "input", image="first"),
        ),
        prompts=("cap_feats", None), guidance="batch, reversed", sample="x", time="t",
        timestep_scale=_from_remaining,
        grid=lambda arguments: tuple(side // 2 for side in arguments["x"][0].shape[-2:]), patch=2,
        pack=lambda pipe, latents: latents.unsqueeze(2), list_inputs=True,
        modular={"ZImageModularPipeline": "ZImagePipeline"},
    ),
    Architecture(
        name="Lumina2",
        pipelines=("Lumina2Pipeline",),
        denoiser_class="Lumina2Transformer2DModel", blocks=("noise_refiner", "layers"),
        hook_points=(
            HookPoint("noise_refiner.*.attn.to_out.0", "input"),
            HookPoint("layers.*.attn.to_out.0", "input", image="last"),
        ),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None), guidance="calls",
        timestep_scale=_from_remaining, grid=_grid_from_shape("hidden_states", 2), patch=2,
        drops_text_padding="encoder_attention_mask",
    ),
    Architecture(
        name="HunyuanImage",
        pipelines=("HunyuanImagePipeline",),
        denoiser_class="HunyuanImageTransformer2DModel", blocks=("transformer_blocks", "single_transformer_blocks"),
        hook_points=(
            HookPoint("transformer_blocks.*.attn.to_out.0", "input"),
            # These attentions have no output projection, and return image and text apart.
            HookPoint("single_transformer_blocks.*.attn", "output"),
        ),
        prompts=(
            "encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        guidance="calls", grid=_grid_from_shape("hidden_states", 1),
        shuffles_text_mask=("encoder_attention_mask", "encoder_attention_mask_2"),
    ),
    Architecture(
        name="Krea2",
        pipelines=("Krea2Pipeline",),
        denoiser_class="Krea2Transformer2DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn.to_out.0", "input", image="last"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask"), guidance="calls",
        timestep_scale=_from_unit_interval, shared=("position_ids",), grid=_grid_from_ids("position_ids"), patch=2,
        pack=_pack, frames=True,
        modular={"Krea2ModularPipeline": "Krea2Pipeline", "Krea2TurboModularPipeline": "Krea2Pipeline"},
    ),
    Architecture(
        name="Wan",
        pipelines=("WanPipeline",),
        denoiser_class="WanTransformer3DModel", blocks=("blocks",),
        hook_points=(HookPoint("blocks.*.attn1.to_out.0", "input"),), prompts=("encoder_hidden_states", None),
        guidance="calls", grid=_grid_from_shape("hidden_states", 2), patch=2, video=True,
        modular={"WanModularPipeline": "WanPipeline"},
    ),
    Architecture(
        name="LTX",
        pipelines=("LTXPipeline",),
        denoiser_class="LTXVideoTransformer3DModel", blocks=("transformer_blocks",),
        hook_points=(HookPoint("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        shuffles_text_mask=("encoder_attention_mask",), guidance="batch",
        grid=lambda arguments: tuple(arguments[name] for name in ("num_frames", "height", "width")), video=True,
        modular={"LTXModularPipeline": "LTXPipeline"},
    ),
)  # fmt: skip
