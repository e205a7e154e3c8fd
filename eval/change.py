"""How much did a method change images that it should have left alone? Compared with the same groups of another run."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from eval.encoders import Pixels, Scorer, unit_vectors
from eval.imageset import ImageSet
from eval.metric import Folder, Metric


class BaselineMetric(Metric):
    """A metric of images and of those that another run made of the same prompts and noises.

    `update` takes both, N images each.

    Args:
        encoder: what embeds or compares both.
        baseline: the other run's folder.
    """

    higher_is_better = False

    def __init__(self, encoder: Scorer | None = None, baseline: Folder = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.baseline = baseline
        self._paired: tuple[ImageSet, ImageSet] | None = None

    @cached_property
    def _others(self) -> ImageSet:
        return ImageSet.open(self.folder("baseline"))

    def settings(self) -> dict[str, Any]:
        """Identify the other run by its images."""
        return {"baseline_sha256": self._others.only(self.only).manifest_hash}

    def paired(self, images: ImageSet) -> ImageSet:
        """Return the other run's images, each in the place of the one that was made of the same noise.

        Raises:
            ValueError: a group is not there, or has another number of images.
        """
        groups, rows = self._others.groups, self._others.rows
        missing = [group for group in images.groups if len(groups.get(group, ())) != len(images.groups[group])]
        if missing:
            raise ValueError(
                f"expected the groups of {images.folder} in {self.baseline} too, with as many images, got others for "
                f"{len(missing)} of them: {', '.join(missing[:5])}; compare runs of the same prompts"
            )
        return images.beside(ImageSet(self.baseline, [rows[i] for group in images.groups for i in groups[group]]))

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, Any]:
        if self._paired is None or self._paired[0] is not images:
            self._paired = images, self.paired(images)
        mine, theirs = (self.encoder.of(each, positions) for each in self._paired)
        return mine, theirs


class Change(BaselineMetric):
    """Mean cosine distance of a group's images to the other run's, image by image; 0 where nothing changed."""

    name = "change"
    unit = "1 - cosine, 0 to 2"
    description = "mean over a group's images of 1 - cosine with the image of the same noise in the baseline's run"
    bounds = (0.0, 2.0)

    def score(self, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        # 1 - cosine as half the squared distance of unit vectors, which is exactly 0 for equal ones.
        _check_counts(mine.shape, theirs.shape)
        return (unit_vectors(mine) - unit_vectors(theirs)).square().sum(dim=-1).div(2)


class ChangedShare(BaselineMetric):
    """Share of a group's images that differ from the other run's in any pixel."""

    name = "changed_share"
    unit = "share of images, 0 to 1"
    description = "share of a group's images that differ in any pixel from the image of the same noise in the baseline"
    bounds = (0.0, 1.0)
    encoder = Pixels()

    def __init__(self, baseline: Folder = None, **options: Any) -> None:
        super().__init__(None, baseline, **options)

    def score(self, mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        _check_counts([len(mine)], [len(theirs)])
        return torch.tensor([not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)])


def _check_counts(mine: Sequence[int], theirs: Sequence[int]) -> None:
    if mine != theirs:
        raise ValueError(f"expected as many of the baseline's images, got {list(mine)} and {list(theirs)}; pair them")
