"""Encode, scale and noise reference images, and embed their prompts, as the pipeline does with its own."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from negtome.architectures import Architecture
from negtome.call_inspection import DenoiserCall


def encoding_pipeline(architecture: Architecture, pipe: Any) -> Any:
    """Return the pipeline whose methods encode references.

    A ModularPipeline spreads them over its blocks, so the stock pipeline with the same components stands in for it.
    """
    if architecture.guidance != "guider":
        return pipe
    import diffusers

    names = (cls.__name__ for cls in type(pipe).__mro__)
    stock = next(architecture.modular[name] for name in names if name in architecture.modular)
    cls = getattr(diffusers, stock)
    components = pipe.components
    settings = {name: value for name, value in pipe.config.items() if name not in components}
    parts: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:  # without self
        default = None if parameter.default is parameter.empty else parameter.default
        parts[name] = components.get(name, settings.get(name, default))
    return cls(**parts)


def encode(architecture: Architecture, pipe: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Encode images [R, 3, H, W] in [-1, 1]; return the mode of the latents and the posterior, if any."""
    pixels = pixels.unsqueeze(2) if architecture.frames else pixels
    vae = pipe.vae
    # The autoencoder of SDXL overflows in float16; float16 survives the way there and back unchanged.
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if upcast:
            vae.to(dtype=torch.float32)
        encoded = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
    posterior = getattr(encoded, "latent_dist", None)  # AutoencoderTiny and AutoencoderDC return the latents alone
    return encoded[0] if posterior is None else posterior.mode(), posterior


def scale_latents(architecture: Architecture, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scale the autoencoder's latents as the pipeline denoises them: float32 [R, c, h, w]."""
    latents = latents.float()
    latents = latents.squeeze(2) if architecture.frames else latents
    if architecture.scale is not None:
        return architecture.scale(pipe, latents)
    config = pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        latents = (latents - mean) / std
    elif shift := getattr(config, "shift_factor", None):
        latents = latents - shift
    return latents * getattr(config, "scaling_factor", 1)


def noise_latents(pipe: Any, latents: torch.Tensor, noise: torch.Tensor | None, call: DenoiserCall) -> torch.Tensor:
    """Noise latents, packed or not, to the level of a call's step, scaled as the denoiser expects them."""
    scheduler = pipe.scheduler
    if noise is not None:
        between = any(hasattr(scheduler, name) for name in ("sigmas_interpol", "mid_point_sigma"))
        if hasattr(scheduler, "scale_noise"):  # a flow's: (1 - sigma) latents + sigma noise
            latents = scheduler.scale_noise(latents, call.time, noise)
        elif between and not scheduler.state_in_first_order:
            # A step of KDPM2 or DPM-Solver-SDE between two of the schedule, whose level add_noise does not know: the
            # one that 1 is scaled by, 1 / sqrt(sigma^2 + 1).
            scale = scheduler.scale_model_input(latents.new_ones((), dtype=torch.float64), call.time[0])
            latents = latents + (1 / scale**2 - 1).sqrt().to(latents) * noise
        else:
            latents = scheduler.add_noise(latents, noise, call.time)
    return scheduler.scale_model_input(latents, call.time[0]) if hasattr(scheduler, "scale_model_input") else latents


def embed(
    architecture: Architecture, pipe: Any, prompt: str, call: DenoiserCall, pipeline_arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Embed a prompt as the pipeline embeds those of a call.

    Args:
        architecture: of the pipeline.
        pipe: the pipeline.
        prompt: one text.
        call: of the denoiser, which will get the embeddings.
        pipeline_arguments: of the pipeline's call; options such as clip_skip hold for this prompt too.

    Returns:
        [1, ...] for each denoiser argument that holds the text.

    Raises:
        ValueError: the call's embeddings have another number of tokens than the pipeline makes of the prompt.
    """
    options = {n: value for n, value in pipeline_arguments.items() if "prompt" not in n or n == "system_prompt"}
    if pipeline_arguments.get("prompt") is None and not architecture.list_inputs:
        # The call got embeddings, and its options say nothing about their length.
        options["max_sequence_length"] = call.text.shape[1]
    options |= {
        "prompt": prompt,
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    parameters = inspect.signature(pipe.encode_prompt).parameters
    values = pipe.encode_prompt(**{name: value for name, value in options.items() if name in parameters})
    embedded = {
        name: value
        for name, value in zip(architecture.prompts, values, strict=False)
        if name is not None and name in call.prompts
    }
    if architecture.list_inputs:
        return {name: texts[0].unsqueeze(0) for name, texts in embedded.items()}
    for name, value in embedded.items():
        if value is None:  # a mask in which all tokens are text
            embedded[name] = torch.ones_like(call.prompts[name][:1])
    value, expected = next(iter(embedded.values())), call.text  # a mask may also cover the tokens of the image
    lengths = value.shape[1], expected.shape[1]
    if (mask := architecture.drops_text_padding) is not None:
        lengths = int(embedded[mask][0].sum()), int(call.prompts[mask][0].sum())
    if value.shape[1:] != expected.shape[1:] or lengths[0] != lengths[1]:
        raise ValueError(
            f"NegToMe expected text embeddings of {lengths[0]} tokens, as those of a Reference's prompt, got "
            f"{lengths[1]}; shorten the prompts, or leave that prompt out, and each image lends its own."
        )
    return embedded
