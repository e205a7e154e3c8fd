"""The architectures that NegToMe can be attached to, as a table: names and units of diffusers, and nothing that runs.

A further architecture is a further row of `ARCHITECTURES`, a further pipeline of one is a further name in its row, and
both need a tiny pipeline in the tests. Everything is matched by name, so nothing of diffusers is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Place:
    """A kind of site: where in a denoiser the image tokens of an attention can be had.

    Attributes:
        pattern: the modules' names in the denoiser, with * as a wildcard.
        where: "output" or "input" (its first argument) of the module; of an output that is a tuple, its first item.
        cross: whether these are outputs of attention to the text.
        image: where the tokens of the images stand, those of the generated image before those of given ones: "all"
            (there is nothing else), "first", or "last" (behind a text).
        width: where the features are the leading channels only, the attribute of the module's parent that counts them.
    """

    pattern: str
    where: Literal["output", "input"]
    cross: bool = False
    image: Literal["all", "first", "last"] = "all"
    width: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Names of the denoiser's arguments may lead into mappings: "added_cond_kwargs.text_embeds".

    Attributes:
        name: as in `NegToMeConfig.preset`, which has it in lower case.
        pipelines: names of the pipeline classes (subclasses included), each of which is tested.
        denoiser: the pipelines' attribute that holds the denoiser.
        denoiser_class: name of its class.
        blocks: the blocks that take part where the config does not say.
        places: the kinds of sites.
        prompts: names of the denoiser's arguments that hold the text, each with a row for an image, in the order in
            which the pipeline's `encode_prompt` returns their values; None for a value that is not one of them.
        guidance: "batch": one batch [unconditional, conditional], and after that whatever else is conditioned on the
            prompt (perturbed attention). "batch, reversed": [conditional, unconditional]. "calls": two calls of the
            denoiser in a step, conditional and unconditional.
        sample: name of the argument that holds the latents, [rows, c, h, w], [rows, c, F, h, w] or packed [rows, N, C].
            Given images may stand in further channels, or in further tokens.
        time: name of the argument that holds the time.
        clock: its value -> training timesteps, 1000 = pure noise; for calls of which the scheduler knows nothing yet.
        shared: names of the arguments that have no row for each image, whatever their shape.
        grid: (height, width) of the generated image in tokens, of the largest feature map, or (frames, height, width)
            of a video, from the denoiser's arguments.
        levels: whether there are smaller feature maps too, each half as high and wide as the one before.
        patch: side of a token in the latent.
        mixed: names of the text's masks, where the pipeline gives an image those of other prompts: with several prompts
            and several images of each, [p, q, p, q] beside embeddings [p, p, q, q].
        trimmed: name of the text's mask, where the denoiser drops the padding: the tokens of the images begin where the
            text ends, so that all texts of a call must be of one length.
        scale: pipeline, the autoencoder's latents [R, c, h, w] -> as they are noised, where that is not by the
            numbers in its config.
        pack: pipeline, scaled latents or noise -> as the denoiser takes them.
        frames: whether the autoencoder is one of videos: [R, 3, 1, H, W] -> [R, c, 1, h, w].
        video: whether a video is generated, whose frames are pushed as one image is. Experimental: takes no references.
        listed: whether latents, text and output are lists with a tensor for each row.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser_class: str
    blocks: tuple[str, ...]
    places: tuple[Place, ...]
    prompts: tuple[str | None, ...]
    guidance: Literal["batch", "batch, reversed", "calls"]
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    denoiser: str = "transformer"
    sample: str = "hidden_states"
    time: str = "timestep"
    clock: Callable[[float], float] = float
    shared: tuple[str, ...] = ()
    levels: bool = False
    patch: int = 1
    mixed: tuple[str, ...] = ()
    trimmed: str | None = None
    scale: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    pack: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    frames: bool = False
    video: bool = False
    listed: bool = False

    @property
    def per_prompt(self) -> str:
        """Name of the pipelines' argument that says how many images, or videos, each prompt has."""
        return "num_videos_per_prompt" if self.video else "num_images_per_prompt"


def _by_ids(name: str) -> Callable[[Mapping[str, Any]], tuple[int, int]]:
    """Read the grid from an argument [.., N, 3 or 4]: of every image token the number of its image, row and column."""

    def grid(arguments: Mapping[str, Any]) -> tuple[int, int]:
        ids = arguments[name].flatten(end_dim=-2)
        height, width = (ids[ids[:, 0] == 0, 1:3].amax(dim=0) + 1).tolist()  # the generated image's number is 0
        return int(height), int(width)

    return grid


def _by_shape(name: str, patch: int) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """Read the grid from an argument [rows, c, (F,) h, w], of whose elements a token has patch x patch."""

    def grid(arguments: Mapping[str, Any]) -> tuple[int, ...]:
        *frames, height, width = arguments[name].shape[2:]
        return *frames, height // patch, width // patch

    return grid


def _of_thousandths(time: float) -> float:
    return 1000 * time


def _of_what_is_done(time: float) -> float:
    return 1000 * (1 - time)


def _packed(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Put 2x2 patches of latents [R, c, h, w] into tokens, as the pipeline does."""
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def _patched_and_normalised(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Put 2x2 patches of latents into their channels, and scale these by the statistics of the autoencoder."""
    mean, variance = (values.to(latents) for values in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    epsilon = pipe.vae.config.batch_norm_eps
    return torch.nn.functional.batch_norm(pipe._patchify_latents(latents), mean, variance, eps=epsilon)


_UNET: dict[str, Any] = {
    "denoiser": "unet",
    "denoiser_class": "UNet2DConditionModel",
    "blocks": ("up_blocks",),
    "places": (
        # After the output projection, as in the release for SDXL.
        Place("*.attn1", "output"),
        Place("*.attn2", "output", cross=True),
    ),
    "guidance": "batch",
    "sample": "sample",
    "grid": _by_shape("sample", 1),
    "levels": True,
}

_FLUX: dict[str, Any] = {
    "blocks": ("transformer_blocks", "single_transformer_blocks"),
    "places": (
        # Before the output projection, as in the release. Text and image have been separated here.
        Place("transformer_blocks.*.attn.to_out.0", "input", image="first"),
        # These attentions have no output projection: their output is text and image together.
        Place("single_transformer_blocks.*.attn", "output", image="last"),
    ),
    "guidance": "calls",  # true guidance
    "clock": _of_thousandths,
    "shared": ("img_ids", "txt_ids"),
    "grid": _by_ids("img_ids"),
    "patch": 2,
    "pack": _packed,
}

ARCHITECTURES = (
    Architecture(
        name="SDXL",
        pipelines=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLAdapterPipeline",
        ),
        prompts=("encoder_hidden_states", None, "added_cond_kwargs.text_embeds", None),
        **_UNET,
    ),
    Architecture(
        name="SD1.5",
        pipelines=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
        ),
        prompts=("encoder_hidden_states", None),
        **_UNET,
    ),
    Architecture(
        name="Flux",
        pipelines=(
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxFillPipeline",
            "FluxControlPipeline",
            "FluxControlNetPipeline",
            "FluxKontextPipeline",
        ),
        denoiser_class="FluxTransformer2DModel",
        prompts=("encoder_hidden_states", "pooled_projections", None),
        **_FLUX,
    ),
    Architecture(
        name="SD3",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        denoiser_class="SD3Transformer2DModel",
        blocks=("transformer_blocks",),
        places=(
            Place("transformer_blocks.*.attn.to_out.0", "input"),
            # Of SD3.5 medium: a second attention of the images to themselves.
            Place("transformer_blocks.*.attn2.to_out.0", "input"),
        ),
        prompts=("encoder_hidden_states", None, "pooled_projections", None),
        guidance="batch",
        grid=_by_shape("hidden_states", 2),
        patch=2,
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
        denoiser_class="PixArtTransformer2DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        guidance="batch",
        grid=_by_shape("hidden_states", 2),
        patch=2,
    ),
    Architecture(
        name="Sana",
        pipelines=("SanaPipeline",),
        denoiser_class="SanaTransformer2DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        mixed=("encoder_attention_mask",),
        guidance="batch",
        grid=_by_shape("hidden_states", 1),
    ),
    Architecture(
        name="AuraFlow",
        pipelines=("AuraFlowPipeline",),
        denoiser_class="AuraFlowTransformer2DModel",
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        places=(
            Place("joint_transformer_blocks.*.attn.to_out.0", "input"),
            # Behind registers and the text.
            Place("single_transformer_blocks.*.attn.to_out.0", "input", image="last"),
        ),
        prompts=("encoder_hidden_states", None, None, None),
        guidance="batch",
        clock=_of_thousandths,
        grid=_by_shape("hidden_states", 2),
        patch=2,
    ),
    Architecture(
        name="CogView4",
        pipelines=("CogView4Pipeline",),
        denoiser_class="CogView4Transformer2DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn1.to_out.0", "input", image="last"),),
        prompts=("encoder_hidden_states", None),
        guidance="calls",
        grid=_by_shape("hidden_states", 2),
        patch=2,
    ),
    Architecture(
        name="Flux2",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        denoiser_class="Flux2Transformer2DModel",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        places=(
            Place("transformer_blocks.*.attn.to_out.0", "input", image="first"),
            # These project [attention, MLP] together.
            Place("single_transformer_blocks.*.attn.to_out", "input", image="last", width="inner_dim"),
        ),
        prompts=("encoder_hidden_states", None),
        guidance="calls",  # klein's; dev has its own embedded
        clock=_of_thousandths,
        grid=_by_ids("img_ids"),
        patch=2,
        scale=_patched_and_normalised,
        pack=lambda pipe, latents: pipe._pack_latents(latents),
    ),
    Architecture(
        name="Qwen",
        pipelines=(
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
        ),
        denoiser_class="QwenImageTransformer2DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn.to_out.0", "input", image="first"),),
        prompts=("encoder_hidden_states", "encoder_hidden_states_mask"),
        guidance="calls",
        clock=_of_thousandths,
        shared=("img_shapes",),
        grid=lambda arguments: tuple(arguments["img_shapes"][0][0][1:]),
        patch=2,
        pack=_packed,
        frames=True,
        mixed=("encoder_hidden_states_mask",),
    ),
    Architecture(
        name="ZImage",
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        denoiser_class="ZImageTransformer2DModel",
        blocks=("noise_refiner", "layers"),
        places=(
            # The image, padded to a multiple of 32 tokens, and in the layers the text behind it.
            Place("noise_refiner.*.attention.to_out.0", "input", image="first"),
            Place("layers.*.attention.to_out.0", "input", image="first"),
        ),
        prompts=("cap_feats", None),
        guidance="batch, reversed",
        sample="x",
        time="t",
        clock=_of_what_is_done,
        grid=lambda arguments: tuple(side // 2 for side in arguments["x"][0].shape[-2:]),
        patch=2,
        pack=lambda pipe, latents: latents.unsqueeze(2),
        listed=True,
    ),
    Architecture(
        name="Lumina2",
        pipelines=("Lumina2Pipeline",),
        denoiser_class="Lumina2Transformer2DModel",
        blocks=("noise_refiner", "layers"),
        places=(
            Place("noise_refiner.*.attn.to_out.0", "input"),
            Place("layers.*.attn.to_out.0", "input", image="last"),
        ),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        guidance="calls",
        clock=_of_what_is_done,
        grid=_by_shape("hidden_states", 2),
        patch=2,
        trimmed="encoder_attention_mask",
    ),
    Architecture(
        name="HunyuanImage",
        pipelines=("HunyuanImagePipeline",),
        denoiser_class="HunyuanImageTransformer2DModel",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        places=(
            Place("transformer_blocks.*.attn.to_out.0", "input"),
            # These attentions have no output projection, and return image and text apart.
            Place("single_transformer_blocks.*.attn", "output"),
        ),
        prompts=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        guidance="calls",
        grid=_by_shape("hidden_states", 1),
        mixed=("encoder_attention_mask", "encoder_attention_mask_2"),
    ),
    Architecture(
        name="Krea2",
        pipelines=("Krea2Pipeline",),
        denoiser_class="Krea2Transformer2DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn.to_out.0", "input", image="last"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask"),
        guidance="calls",
        clock=_of_thousandths,
        shared=("position_ids",),
        grid=_by_ids("position_ids"),
        patch=2,
        pack=_packed,
        frames=True,
    ),
    Architecture(
        name="Wan",
        pipelines=("WanPipeline",),
        denoiser_class="WanTransformer3DModel",
        blocks=("blocks",),
        places=(Place("blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", None),
        guidance="calls",
        grid=_by_shape("hidden_states", 2),
        patch=2,
        video=True,
    ),
    Architecture(
        name="LTX",
        pipelines=("LTXPipeline",),
        denoiser_class="LTXVideoTransformer3DModel",
        blocks=("transformer_blocks",),
        places=(Place("transformer_blocks.*.attn1.to_out.0", "input"),),
        prompts=("encoder_hidden_states", "encoder_attention_mask", None, None),
        mixed=("encoder_attention_mask",),
        guidance="batch",
        grid=lambda arguments: tuple(arguments[name] for name in ("num_frames", "height", "width")),
        video=True,
    ),
)
