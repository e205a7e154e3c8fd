"""Diversity bought with more candidates instead of a push: the images of a group are chosen among more of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from eval.encoders import Encoder
from experiments.methods.method import GroupResult, Method, Setting, sample
from experiments.prompts import Group
from negtome.validation import check_int


def farthest_first(distance: torch.Tensor, count: int) -> list[int]:
    """Choose `count` of n by distances [n, n]: the first, then always the one farthest from its nearest chosen."""
    chosen = [0]
    while len(chosen) < count:
        nearest = distance[:, chosen].amin(dim=1)
        nearest[chosen] = -math.inf
        chosen.append(int(nearest.argmax()))
    return chosen


def embedded(encoder: Encoder, images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Embed images, [n, H, W, 3] in [0, 1]: [n, D], of length 1."""
    pixels = torch.as_tensor(255 * images).round().byte().permute(0, 3, 1, 2)
    return torch.nn.functional.normalize(encoder.embed_images(list(pixels)), dim=1)


def distances(features: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine of embeddings of length 1, [n, D], as [n, n]."""
    return 1 - features @ features.T


@dataclass
class Selection(Method):
    """A group's images, chosen among candidates, the first of which begin from the noises of the group's own images.

    What is chosen by tells nothing about the method when images are judged by it.

    Attributes:
        encoder: of images, 1 - cosine of whose embeddings is how far they are apart.
        candidates: how many, at least the images of a group.
    """

    columns: ClassVar[tuple[Setting, ...]] = (Setting("candidates", number=True),)

    name: str
    encoder: Encoder
    candidates: int = 8

    def __post_init__(self) -> None:
        self.candidates = check_int("method.candidates", self.candidates, 1, 10**6)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "encoder": self.encoder.id}

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        if self.candidates < group.size:
            raise ValueError(
                f"method={self.name} chooses the {group.size} images of a group among {self.candidates}: set "
                "method.candidates to at least as many"
            )
        if group.size == 1 or self.candidates == group.size:  # there is nothing to choose
            return super().generate(pipe, group, call)
        seeds = dataclasses.replace(group, size=self.candidates).image_seeds()
        images, chosen = self.choose(pipe, group, call, seeds)
        return GroupResult(images, {"chosen": chosen}, seeds=[seeds[one] for one in chosen])

    def choose(
        self, pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        """Return `group.size` images, float [K, H, W, 3], of noises of some of the seeds, and of which ones."""
        raise NotImplementedError


@dataclass
class BestOf(Selection):
    """The group's first image, and of all further candidates always the one that is least like those chosen before.

    Gonzalez' farthest-first traversal (1985). Candidates are made in calls of as many images as the group has, so that
    its own are what they are without a method, and no more memory is needed.
    """

    title: ClassVar[str] = "best of several"
    version: ClassVar[int] = 1

    def choose(
        self, pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        parts = [seeds[start : start + group.size] for start in range(0, len(seeds), group.size)]
        images = np.concatenate([sample(pipe, group, call, part) for part in parts])
        chosen = farthest_first(distances(embedded(self.encoder, images)), group.size)
        return images[chosen], chosen
