"""Full-size pipelines of random weights, to measure time and memory where a checkpoint is absent.

Neither depends on the values of the weights. The denoiser has the published architecture; the text encoders, which
every method runs alike, are replaced by random embeddings, and the autoencoder by a tiny one of the right shapes, for
references alone: images are never decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

#: Hyperparameters of SDXL's UNet as published (stabilityai/stable-diffusion-xl-base-1.0, unet/config.json).
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # diffusers' name for the number of heads; each has 64 channels
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
#: Hyperparameters of FLUX.1-dev's transformer as published (black-forest-labs/FLUX.1-dev, transformer/config.json).
FLUX_DEV_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
DENOISERS: dict[str, tuple[type[torch.nn.Module], dict[str, Any]]] = {
    "sdxl": (UNet2DConditionModel, SDXL_UNET),
    "flux": (FluxTransformer2DModel, FLUX_DEV_TRANSFORMER),
}
#: Text tokens of a prompt, where the call does not say.
SDXL_TEXT_TOKENS, FLUX_TEXT_TOKENS = 77, 512


def build_denoiser(
    architecture: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Build a denoiser of random weights, directly on its device and in its dtype.

    Args:
        architecture: "sdxl" or "flux".
        device: torch device; "meta" for shapes alone.
        dtype: of the weights.
        config: other hyperparameters than the published ones.

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in DENOISERS:
        raise ValueError(f"architecture must be one of {sorted(DENOISERS)}, got {architecture!r}.")
    cls, published = DENOISERS[architecture]
    with _born(device, dtype):
        denoiser = cls(**(published if config is None else config))
    return denoiser.eval().requires_grad_(False)


def build_pipeline(
    architecture: str,
    device: str | torch.device,
    dtype: torch.dtype,
    config: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Build a stock pipeline around `build_denoiser`, without text encoders; see `embeddings` for how to call it."""
    denoiser = build_denoiser(architecture, device, dtype, config)
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    with _born(device, dtype):
        vae = AutoencoderKL(
            block_out_channels=[4, 4, 4, 4],
            norm_num_groups=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=denoiser.config.in_channels // (1 if architecture == "sdxl" else 4),
            shift_factor=0.0,
        ).eval()
    if architecture == "sdxl":
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        )
        pipe = StableDiffusionXLPipeline(vae=vae, unet=denoiser, scheduler=scheduler, add_watermarker=False, **without)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = FluxPipeline(vae=vae, transformer=denoiser, scheduler=scheduler, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: DiffusionPipeline, images: int, text_tokens: int | None = None) -> dict[str, Any]:
    """Return the arguments that take the place of a prompt in a call of `build_pipeline`'s pipelines.

    Each image has its own copy, as it has with a prompt: FluxPipeline does not copy embeddings that it is given.

    Args:
        pipe: the pipeline.
        images: in the call, all of one prompt.
        text_tokens: tokens of the prompt; None: SDXL's 77, Flux's 512.
    """
    generator = torch.Generator().manual_seed(0)
    denoiser = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    config = denoiser.config

    def random(*shape: int) -> torch.Tensor:
        one = torch.randn(1, *shape, generator=generator).to(denoiser.device, denoiser.dtype)
        return one.repeat(images, *[1] * len(shape))

    if hasattr(pipe, "transformer"):
        return {
            "prompt_embeds": random(text_tokens or FLUX_TEXT_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": random(config.pooled_projection_dim),
            "num_images_per_prompt": 1,
        }
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"num_images_per_prompt": 1} | {
        name: random(*shape)
        for prefix in ("", "negative_")
        for name, shape in (
            (f"{prefix}prompt_embeds", (text_tokens or SDXL_TEXT_TOKENS, config.cross_attention_dim)),
            (f"{prefix}pooled_prompt_embeds", (pooled,)),
        )
    }


@contextmanager
def _born(device: str | torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let modules be made on a device and in a dtype, with no copy elsewhere at any time."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)
