"""The models' own ways to avoid protected concepts: a negative prompt, and a negative image prompt."""

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
    """Name the protected concept that is nearest to the prompt in a negative prompt.

    Args:
        retriever: finds the concept.
        prompt: with {} for the concept's name; it follows the model's own negative prompt, after a comma.
        true_cfg_scale: guidance scale away from the negative prompt, for pipelines whose own guidance is distilled
            (Flux); None for the others.

    Raises:
        ValueError: when applied to a pipeline without negative prompts (FLUX.2).
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
        references = self.retriever.find(pipe, group, call)
        context = MethodContext(dict(call), references={asset.label: score for asset, score in references})
        if references:
            names = dict.fromkeys(self.prompt.format(asset.name) for asset, _ in references)
            context.call["negative_prompt"] = ", ".join(filter(None, [call.get("negative_prompt"), *names]))
            if self.true_cfg_scale is not None:
                context.call["true_cfg_scale"] = self.true_cfg_scale
        yield context


class NegativeIPAdapter(Method):
    """Show the protected concept that is nearest to the prompt to the unconditional half (IP-Adapter, SDXL).

    The conditional half gets the adapter's embedding of no image. Like NegToMe, the method takes reference images as
    negatives, but it needs another network that was trained to read images.

    Args:
        retriever: finds the concept's reference images.
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
        references = self.retriever.find(pipe, group, call)
        scores = {asset.label: score for asset, score in references}
        if not references:
            yield MethodContext(dict(call), references=scores)
            return
        pipe.load_ip_adapter(**self.weights)
        try:
            pipe.set_ip_adapter_scale(self.scale)
            pictures = [load_picture(asset.file) for asset, _ in references]
            # The adapter's layout is [unconditional, conditional]; the former stands for no image: zeros, or the
            # embedding of a black image, as the adapter was trained.
            with torch.no_grad():
                (embedded,) = pipe.prepare_ip_adapter_image_embeds(
                    [pictures], None, pipe._execution_device, 1, do_classifier_free_guidance=True
                )
            halves = [torch.cat(embedded.chunk(2)[::-1])]
            yield MethodContext(dict(call) | {"ip_adapter_image_embeds": halves}, references=scores)
        finally:
            pipe.unload_ip_adapter()
