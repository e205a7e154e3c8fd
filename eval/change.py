"""How much did a method change images that it should have left alone? Compared with the same groups of another run."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.aggregates import GroupValue
from eval.encoders import Encoder
from eval.images import load_image
from eval.imageset import ImageSet
from eval.metric import Metric


class _AgainstBaseline(Metric):
    """A metric of images and of those that another run made of the same prompts and noises.

    Args:
        encoder: what embeds both; None where their pixels are compared.
        baseline: the other run's folder.
        name: for tables.
    """

    version = 1
    higher_is_better = False
    bounds = (0.0, None)

    def __init__(self, encoder: Encoder | None, baseline: str | Path, name: str | None = None) -> None:
        super().__init__(encoder, name)
        self.baseline = Path(baseline)

    @cached_property
    def _others(self) -> ImageSet:
        return ImageSet.open(self.baseline)

    def settings(self) -> dict[str, Any]:
        """Identify the other run by its images."""
        return {"baseline_sha256": self._others.only(self.only).manifest_hash}

    def _pairs(self, images: ImageSet) -> tuple[ImageSet, dict[str, list[tuple[int, int]]]]:
        """Return the other run's images, with the cache of `images`; and every group's places in both."""
        rows = self._others.only(self.only).rows
        others = ImageSet(self.baseline, rows, images.cache, images.batch_size, images.progress)
        missing = [group for group in images.groups if len(others.groups.get(group, ())) != len(images.groups[group])]
        if missing:
            raise ValueError(
                f"expected the groups of {images.folder} in {self.baseline} too, with as many images, got others for "
                f"{len(missing)} of them: {', '.join(missing[:5])}; compare runs of the same prompts"
            )
        return others, {
            group: list(zip(members, others.groups[group], strict=True)) for group, members in images.groups.items()
        }


class Change(_AgainstBaseline):
    """Mean cosine distance of a group's images to the other run's, image by image; 0 where nothing changed."""

    name = "change"
    unit = "1 - cosine, 0 to 2"
    description = "mean over a group's images of 1 - cosine with the image of the same noise in the baseline's run"
    bounds = (0.0, 2.0)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`."""
        others, groups = self._pairs(images)
        mine, theirs = images.embeddings(self.encoder).double(), others.embeddings(self.encoder).double()
        values = []
        for group, pairs in groups.items():
            here, there = (torch.tensor(places) for places in zip(*pairs, strict=True))
            # 1 - cosine as half the squared distance of unit vectors, which is exactly 0 for equal ones.
            apart = F.normalize(mine[here], dim=1) - F.normalize(theirs[there], dim=1)
            values.append(images.group_value(group, value=apart.square().sum(dim=1).div(2).mean().item()))
        return values


class _Pixels:
    """Compares images as they are; see `eval.metric.Judge`."""

    name = "pixels"
    id = "pixels"


class ChangedShare(_AgainstBaseline):
    """Share of a group's images that differ from the other run's in any pixel.

    Args:
        baseline: the other run's folder.
        name: for tables.
    """

    name = "changed_share"
    unit = "share of images, 0 to 1"
    description = "share of a group's images that differ in any pixel from the image of the same noise in the baseline"
    bounds = (0.0, 1.0)
    judge = _Pixels()

    def __init__(self, baseline: str | Path, name: str | None = None) -> None:
        super().__init__(None, baseline, name)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`."""
        others, groups = self._pairs(images)
        values = []
        for group, pairs in groups.items():
            different = [
                not torch.equal(
                    load_image(images.folder / images.rows[here].path),
                    load_image(others.folder / others.rows[there].path),
                )
                for here, there in pairs
            ]
            values.append(images.group_value(group, value=sum(different) / len(different)))
        return values
