"""The compared methods, behind one interface: change what a stock pipeline generates for the length of a `with` block.

A further method is a further class here (or in a file beside this one) and a file in conf/method/; no experiment knows
any method by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import negtome
from experiments.assets import Retriever
from experiments.prompts import Group


@dataclass
class Applied:
    """A method at work on one group.

    Attributes:
        call: keyword arguments of the pipeline's call: those of the model, as far as the method did not change them.
        attached: NegToMe's attachment, where there is one.
        references: the assets the method was given for this group, file -> score by which it was found; None where the
            method takes none.
    """

    call: dict[str, Any]
    attached: negtome.Attachment | None = None
    references: Mapping[str, float] | None = None

    def statistics(self) -> dict[str, Any]:
        """Return what the run's log should keep of the finished call."""
        return {} if self.attached is None else self.attached.summary()


class Method(Protocol):
    """What an experiment asks of a method.

    Attributes:
        name: in folders and tables.
        version: raised whenever the same settings would make other pixels, whatever was edited; runs
            of another version are neither gone on with nor put into a table (tests/experiments/test_golden.py tells).
    """

    name: str
    version: int

    def settings(self) -> dict[str, Any]:
        """Return every setting of the method that affects pixels, as JSON values: part of the run's identity."""

    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> contextlib.AbstractContextManager[Applied]:
        """Change what `pipe` generates for `group` until the block ends.

        The block calls `pipe(group.prompt, ..., **applied.call)` once.

        Args:
            pipe: a stock pipeline.
            group: the images to be generated together.
            call: further keyword arguments that the pipeline is to be called with.
        """


class Baseline:
    """The stock pipeline: changes nothing."""

    version = 0  # what all runs share has a version of its own, `experiments.runs.GENERATION_VERSION`

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def settings(self) -> dict[str, Any]:
        return {}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        yield Applied(dict(call))


class NegToMe:
    """Negative token merging (arXiv 2412.01339) among the images of a group, through `negtome.attach`.

    Args:
        name: the method's name in folders and tables.
        **config: fields of `negtome.NegToMeConfig`; a field that is None takes the dataclass's default.
    """

    version = 1

    def __init__(self, name: str, **config: Any) -> None:
        self.name = name
        self.config = negtome.NegToMeConfig(**{key: value for key, value in config.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        with negtome.attach(pipe, self.config, group_size=group.size) as attached:
            yield Applied(dict(call), attached)


class NegToMeFromAssets(NegToMe):
    """Negative token merging away from the protected assets that the prompt comes nearest to.

    Where no asset is near enough, the pipeline stays as it is.

    Args:
        name: the method's name in folders and tables.
        retriever: finds the assets.
        noise: of `negtome.Reference`.
        posterior: of `negtome.Reference`.
        images: how many pictures of the asset are used, the nearest first; None for all.
        masks: whether the assets' masks are used, where they have some.
        prompt: what the assets are said to show, with {} for their name; None: what the group's prompt says.
        **config: fields of `negtome.NegToMeConfig`; a field that is None takes the dataclass's default.
    """

    version = 1

    def __init__(
        self,
        name: str,
        retriever: Retriever,
        noise: bool = True,
        posterior: str = "mode",
        images: int | None = None,
        masks: bool = True,
        prompt: str | None = None,
        **config: Any,
    ) -> None:
        super().__init__(name, **config)
        self.retriever = retriever
        for setting, value in (("noise", noise), ("masks", masks)):
            if not isinstance(value, bool):
                raise ValueError(f"method.{setting} must be true or false, got {value!r}")
        self.reference = {"noise": noise, "posterior": posterior}
        if images is not None and images < 1:
            raise ValueError(f"method.images must be at least 1, or null for all of an asset, got {images}")
        self.images = images
        self.masks = masks
        self.prompt = prompt

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "reference": "assets",
            **self.reference,
            "images": self.images,
            "masks": self.masks,
            "reference_prompt": self.prompt,
            "retriever": self.retriever.settings(),
        }

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        found = self.retriever.find(pipe, group, call)[: self.images]
        references = {asset.label: score for asset, score in found}
        if not found:
            yield Applied(dict(call), references=references)
            return
        reference = negtome.Reference(
            [asset.image for asset, _ in found],
            mask=[asset.mask for asset, _ in found] if self.masks else None,
            prompt=None if self.prompt is None else self.prompt.format(found[0][0].name),
            **self.reference,
        )
        with negtome.attach(pipe, self.config, given=reference) as attached:
            yield Applied(dict(call), attached, references)


class NegativePrompt:
    """The prompt's nearest protected assets, named in a negative prompt.

    Args:
        name: the method's name in folders and tables.
        retriever: finds the assets.
        prompt: with {} for an asset's name; those of several assets are joined by commas, after the negative prompt
            that the model is called with anyway.
        true_cfg_scale: guidance scale away from the negative prompt, for pipelines whose own guidance is distilled
            (Flux); None for the others.
    """

    version = 1

    def __init__(
        self, name: str, retriever: Retriever, prompt: str = "{}", true_cfg_scale: float | None = None
    ) -> None:
        self.name = name
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
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        found = self.retriever.find(pipe, group, call)
        applied = Applied(dict(call), references={asset.label: score for asset, score in found})
        if found:
            names = dict.fromkeys(self.prompt.format(asset.name) for asset, _ in found)
            applied.call["negative_prompt"] = ", ".join(filter(None, [call.get("negative_prompt"), *names]))
            if self.true_cfg_scale is not None:
                applied.call["true_cfg_scale"] = self.true_cfg_scale
        yield applied


class NegativeIPAdapter:
    """The prompt's nearest protected assets as the image prompt of the unconditional half (IP-Adapter, SDXL).

    The conditional half gets what the adapter takes for no picture. This is the like-for-like alternative to an image
    as negative: another network that was trained to read images.

    Args:
        name: the method's name in folders and tables.
        retriever: finds the assets.
        weights: keyword arguments of the pipeline's `load_ip_adapter`: a repository or folder, its subfolder and file.
        scale: of the adapter's attention, in [0, 1].

    Raises:
        FileNotFoundError: no weights are configured.
        ValueError: when applied to a call without guidance, which has no unconditional half.
    """

    version = 1

    def __init__(self, name: str, retriever: Retriever, weights: Mapping[str, Any] | None, scale: float = 0.5) -> None:
        if not weights:
            raise FileNotFoundError(
                f"method={name} needs an IP-Adapter, and none is configured for this model: give one as "
                "model.ip_adapter={pretrained_model_name_or_path_or_dict: h94/IP-Adapter, subfolder: sdxl_models, "
                "weight_name: ip-adapter-plus_sdxl_vit-h.safetensors, image_encoder_folder: models/image_encoder}, "
                "or leave the method out"
            )
        self.name = name
        self.retriever = retriever
        self.weights = dict(weights)
        self.scale = float(scale)

    def settings(self) -> dict[str, Any]:
        return {"ip_adapter": self.weights, "scale": self.scale, "retriever": self.retriever.settings()}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        if call.get("guidance_scale", 5.0) <= 1:
            raise ValueError(
                f"method={self.name} needs guidance, got guidance_scale={call['guidance_scale']}: set "
                "model.call.guidance_scale above 1, or leave the method out"
            )
        found = self.retriever.find(pipe, group, call)
        references = {asset.label: score for asset, score in found}
        if not found:
            yield Applied(dict(call), references=references)
            return
        pipe.load_ip_adapter(**self.weights)
        try:
            pipe.set_ip_adapter_scale(self.scale)
            pictures = [asset.picture() for asset, _ in found]
            # The adapter's layout: [unconditional, conditional], where the former shows nothing: zeros, or the
            # embedding of a black picture, as the adapter was trained.
            with torch.no_grad():
                (embedded,) = pipe.prepare_ip_adapter_image_embeds(
                    [pictures], None, pipe._execution_device, 1, do_classifier_free_guidance=True
                )
            halves = [torch.cat(embedded.chunk(2)[::-1])]
            yield Applied(dict(call) | {"ip_adapter_image_embeds": halves}, references=references)
        finally:
            pipe.unload_ip_adapter()


class Combined:
    """Several methods at once, the first outermost.

    Each looks for assets as it does alone: in a preview of the model's own call, not of what the methods before it make
    of that. Those that touch the pipeline itself therefore come last.

    Args:
        name: the method's name in folders and tables.
        methods: by name; at most one of them may attach NegToMe, and no two may change the same argument of the call.
    """

    def __init__(self, name: str, methods: Mapping[str, Method]) -> None:
        self.name = name
        self.methods = list(methods.values())
        self.version = sum(method.version for method in self.methods)  # rises with any of them

    def settings(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for method in self.methods:
            merged |= method.settings()
        return merged | {"methods": [{"name": method.name, **method.settings()} for method in self.methods]}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        whole = Applied(dict(call))
        changed: set[str] = set()
        with contextlib.ExitStack() as stack:
            for method in self.methods:
                part = stack.enter_context(method.apply(pipe, group, call))
                changes = {key: value for key, value in part.call.items() if key not in call or value is not call[key]}
                if twice := changed & changes.keys():
                    raise ValueError(
                        f"method={self.name} combines methods that change the same arguments of the call, "
                        f"{sorted(twice)}: leave one of them out"
                    )
                changed |= changes.keys()
                whole.call |= changes
                whole.attached = part.attached or whole.attached
                if part.references is not None:
                    whole.references = {**(whole.references or {}), **part.references}
            yield whole
