"""Negative controls as rows of a table: the baseline's images, edited without any model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.controls import CONTROLS
from experiments.methods.method import GroupResult, Method, sample
from experiments.prompts import Group


@dataclass
class EditedBaseline(Method):
    """The baseline's images with an edit that makes them neither more diverse nor better.

    `experiments.generate` reads the images of the baseline's run and calls `edit_images`, so that a control costs no
    generation. `generate` makes the same images without such a run.

    Attributes:
        edit: one of `eval.controls.CONTROLS`.
    """

    title = "edited baseline"
    version = 1

    name: str
    edit: str

    def __post_init__(self) -> None:
        if self.edit not in CONTROLS:
            raise ValueError(f"method.edit must be one of {', '.join(CONTROLS)}, got {self.edit!r}")

    def edit_images(self, group: Group, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Edit the images of a group, uint8 [3, H, W] each, in their order; noise depends on the images' seeds."""
        edit = CONTROLS[self.edit]
        seeded = enumerate(zip(images, group.image_seeds(), strict=True))
        return [edit(image, index, seed) for index, (image, seed) in seeded]

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        levels = np.round(255 * sample(pipe, group, call)).astype(np.uint8)  # as in a PNG
        edited = self.edit_images(group, list(torch.from_numpy(levels).permute(0, 3, 1, 2)))
        return GroupResult(torch.stack(edited).permute(0, 2, 3, 1).numpy() / np.float32(255), {})
