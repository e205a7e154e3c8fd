"""Choose the images of a group among more candidates: diversity by computing more, without a push."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.encoders import Encoder
from experiments.methods.method import GroupResult, Method, sample
from experiments.methods.setting import numbers
from experiments.prompts import Group
from negtome.validation import check_int


def farthest_first(distance: torch.Tensor, count: int) -> list[int]:
    """Choose `count` of n by distances [n, n]: the first, then repeatedly the farthest from its nearest chosen one."""
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
    """A group's images, chosen among candidates, the first of which have the seeds of the group's own images.

    Do not evaluate the images with the encoder that chooses them.

    Attributes:
        encoder: of images; their distance is 1 - cosine of the embeddings.
        candidates: their number, at least the images of a group.
    """

    columns = numbers("candidates")

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
        if group.size in (1, self.candidates):  # there is nothing to choose
            return super().generate(pipe, group, call)
        seeds = dataclasses.replace(group, size=self.candidates).image_seeds()
        images, chosen = self.choose(pipe, group, call, seeds)
        return GroupResult(images, {"chosen": chosen}, seeds=[seeds[one] for one in chosen])

    def choose(
        self, pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        """Return `group.size` images, float [K, H, W, 3], and the indices of their seeds."""
        raise NotImplementedError


@dataclass
class BestOf(Selection):
    """The group's first image, and then repeatedly the candidate that is least like the images chosen before.

    This is Gonzalez' farthest-first traversal (1985). Each call generates as many candidates as the group has images,
    so that the group's own images are the baseline's, and no more memory is needed.
    """

    title = "best of several"
    version = 1

    def choose(
        self, pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        parts = [seeds[start : start + group.size] for start in range(0, len(seeds), group.size)]
        images = np.concatenate([sample(pipe, group, call, part) for part in parts])
        chosen = farthest_first(distances(embedded(self.encoder, images)), group.size)
        return images[chosen], chosen
