"""What models offer themselves to stay away from protected assets: a negative prompt, and a negative image prompt."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from eval.images import load_picture
from experiments.methods.assets import Retriever
from experiments.methods.method import Method, MethodContext, Setting
from experiments.prompts import Group


class NegativePrompt(Method):
    """The prompt's nearest protected assets, named in a negative prompt.

    Args:
        retriever: finds the assets.
        prompt: with {} for an asset's name; those of several assets are joined by commas, after the negative prompt
            that the model is called with anyway.
        true_cfg_scale: guidance scale away from the negative prompt, for pipelines whose own guidance is distilled
            (Flux); None for the others.

    Raises:
        ValueError: when applied to a pipeline that takes no negative prompt (FLUX.2).
    """

    title = "negative prompt"
    columns = (Setting("true_cfg_scale", heading="true guidance"),)
    version = 1

    def __init__(
        self, name: str, retriever: Retriever, prompt: str = "{}", true_cfg_scale: float | None = None
    ) -> None:
        super().__init__(name)
        self.retriever = retriever
        self.prompt = prompt
        self.true_cfg_scale = None if true_cfg_scale is None else float(true_cfg_scale)

    def settings(self) -> dict[str, Any]:
        return {
            "negative_prompt": self.prompt,
            "true_cfg_scale": self.true_cfg_scale,
            "retriever": self.retriever.settings(),
        }

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if "negative_prompt" not in inspect.signature(pipe).parameters:
            raise ValueError(
                f"method={self.name} needs a pipeline that takes a negative prompt, which a {type(pipe).__name__} does "
                "not: leave the method out, or choose another model"
            )
        found = self.retriever.find(pipe, group, call)
        applied = MethodContext(dict(call), references={asset.label: score for asset, score in found})
        if found:
            names = dict.fromkeys(self.prompt.format(asset.name) for asset, _ in found)
            applied.call["negative_prompt"] = ", ".join(filter(None, [call.get("negative_prompt"), *names]))
            if self.true_cfg_scale is not None:
                applied.call["true_cfg_scale"] = self.true_cfg_scale
        yield applied


class NegativeIPAdapter(Method):
    """The prompt's nearest protected assets as the image prompt of the unconditional half (IP-Adapter, SDXL).

    The conditional half gets what the adapter takes for no picture. This is the like-for-like alternative to an image
    as negative: another network that was trained to read images.

    Args:
        retriever: finds the assets.
        weights: keyword arguments of the pipeline's `load_ip_adapter`: a repository or folder, its subfolder and file.
        scale: of the adapter's attention, in [0, 1].

    Raises:
        FileNotFoundError: no weights are configured.
        ValueError: when applied to a call without guidance, which has no unconditional half.
    """

    title = "negative IP-Adapter"
    version = 1

    def __init__(self, name: str, retriever: Retriever, weights: Mapping[str, Any] | None, scale: float = 0.5) -> None:
        if not weights:
            raise FileNotFoundError(
                f"method={name} needs an IP-Adapter, and none is configured for this model: give one as "
                "method.weights={pretrained_model_name_or_path_or_dict: h94/IP-Adapter, subfolder: sdxl_models, "
                "weight_name: ip-adapter-plus_sdxl_vit-h.safetensors, image_encoder_folder: models/image_encoder}, "
                "or leave the method out"
            )
        super().__init__(name)
        self.retriever = retriever
        self.weights = dict(weights)
        self.scale = float(scale)

    def settings(self) -> dict[str, Any]:
        return {"ip_adapter": self.weights, "scale": self.scale, "retriever": self.retriever.settings()}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if call.get("guidance_scale", 5.0) <= 1:
            raise ValueError(
                f"method={self.name} needs guidance, got guidance_scale={call['guidance_scale']}: set "
                "model.call.guidance_scale above 1, or leave the method out"
            )
        found = self.retriever.find(pipe, group, call)
        references = {asset.label: score for asset, score in found}
        if not found:
            yield MethodContext(dict(call), references=references)
            return
        pipe.load_ip_adapter(**self.weights)
        try:
            pipe.set_ip_adapter_scale(self.scale)
            pictures = [load_picture(asset.file) for asset, _ in found]
            # The adapter's layout: [unconditional, conditional], where the former shows nothing: zeros, or the
            # embedding of a black picture, as the adapter was trained.
            with torch.no_grad():
                (embedded,) = pipe.prepare_ip_adapter_image_embeds(
                    [pictures], None, pipe._execution_device, 1, do_classifier_free_guidance=True
                )
            halves = [torch.cat(embedded.chunk(2)[::-1])]
            yield MethodContext(dict(call) | {"ip_adapter_image_embeds": halves}, references=references)
        finally:
            pipe.unload_ip_adapter()
