"""Full-size pipelines of random weights, to measure time and memory where a checkpoint is absent.

Neither depends on the values of the weights. conf/experiment/latency.yaml holds the published architecture of each
denoiser. Random embeddings replace the text encoders, which every method runs alike. A tiny autoencoder of the right
shapes encodes references; images are never decoded.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from hydra.utils import instantiate
from omegaconf import DictConfig


def build_pipeline(spec: DictConfig, device: str | torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """Build a stock pipeline of a model of `latency.random`, without text encoders; see `embeddings` for its calls.

    Denoiser and autoencoder are made in their dtype, with no copy but on their device; on "meta" they are shapes alone.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            modules = instantiate(spec.modules, _convert_="all")
    finally:
        torch.set_default_dtype(previous)
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = instantiate(spec.pipeline)(**modules, **without)
    for module in modules.values():
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: DiffusionPipeline, spec: DictConfig, images: int, tokens: int | None = None) -> dict[str, Any]:
    """Return the arguments that take the place of a prompt in a call of a pipeline that was built of `spec`.

    Args:
        images: in the call, all of one prompt, each with its own copy: FluxPipeline makes none of given embeddings.
        tokens: text tokens of the prompt; None: as many as are usual.
    """
    generator = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {"num_images_per_prompt": 1}
    for name, (*length, width) in spec.embeddings.items():
        one = torch.randn(1, *[tokens or usual for usual in length], width, generator=generator)
        call[name] = one.to(pipe.device, pipe.dtype).expand(images, *one.shape[1:]).clone()
    return call
