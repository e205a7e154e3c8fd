"""NegToMe: among the images of a group, or away from protected concepts."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import negtome
from experiments.methods.assets import Retriever
from experiments.methods.method import Method, MethodContext, Setting
from experiments.prompts import Group
from negtome.config import RELEASED_SIDE


class NegToMe(Method):
    """Negative token merging (arXiv 2412.01339) among the images of a group, through `negtome.attach`.

    Args:
        **config: fields of `negtome.NegToMeConfig`; a field that is None takes the dataclass's default.
    """

    title = "NegToMe"
    columns: tuple[Setting, ...] = (
        Setting("matching", printed="never"),  # it is part of the methods' names
        Setting("reference", heading="from"),
        Setting("alpha", printed="always", number=True),
        Setting("threshold", printed="always", number=True),
        Setting("timestep_range", ("t_low", "t_high"), "window", "always", number=True),
        Setting("step_range", ("step_first", "step_last"), "step range", number=True, optional=True, upper_first=False),
        Setting("sites", heading="blocks"),
    )
    version = 1

    def __init__(self, name: str, **config: Any) -> None:
        super().__init__(name)
        self.config = negtome.NegToMeConfig(**{key: value for key, value in config.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        # None became the default later; both are the same setting.
        side = RELEASED_SIDE if self.config.min_side is None else self.config.min_side
        settings = dataclasses.asdict(self.config.replace(min_side=side))
        if settings["step_range"] is None:  # a later field: runs of the others keep their ids
            del settings["step_range"]
        return settings

    def check_paper_matching(self) -> None:
        """Refuse settings for which a replacement of the push is not defined.

        Raises:
            ValueError: the matching is not "paper", or the reference is not "first".
        """
        if (self.config.matching, self.config.reference) != ("paper", "first"):
            raise ValueError(
                f'method={self.name} needs matching="paper" and reference="first", got {self.config.matching!r} and '
                f"{self.config.reference!r}: leave them as they are"
            )

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        with negtome.attach(pipe, self.config, group_size=group.size) as attached:
            yield MethodContext(dict(call), attached.summary)


class NegToMeFromAssets(NegToMe):
    """Negative token merging away from the protected concept that is nearest to the prompt.

    If no concept is near enough, the pipeline is unchanged.

    Args:
        retriever: finds the concept's reference images.
        noise, posterior: of `negtome.Reference`.
        images: the number of reference images to use, the nearest first; None for all.
        masks: whether to use the masks of the reference images that have one.
        prompt: the prompt of the reference images, with {} for the concept's name; None: the group's prompt.
        **config: as of `NegToMe`.
    """

    title = "NegToMe from the asset"
    columns = (*NegToMe.columns, Setting("images", ("pictures",), "pictures", number=True), Setting("masks"))
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
        self.reference: dict[str, Any] = {"noise": noise, "posterior": posterior}
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
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        references = self.retriever.find(pipe, group, call)[: self.images]
        scores = {asset.label: score for asset, score in references}
        if not references:
            yield MethodContext(dict(call), references=scores)
            return
        assets = [asset for asset, _ in references]
        reference = negtome.Reference(
            [asset.image for asset in assets],
            mask=[asset.mask for asset in assets] if self.masks else None,
            prompt=None if self.prompt is None else self.prompt.format(assets[0].name),
            **self.reference,
        )
        with negtome.attach(pipe, self.config, references=reference) as attached:
            yield MethodContext(dict(call), attached.summary, scores)
