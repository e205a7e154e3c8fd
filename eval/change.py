"""How much did a method change images that it should not have changed? A comparison with the baseline's images."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from eval.encoders import Pixels, Scorer, unit_vectors
from eval.imageset import ImageSet
from eval.metric import Folder, Metric


class BaselineMetric(Metric):
    """A metric that compares images with the images of another run from the same prompts and seeds.

    `update` takes N images of each run.

    Args:
        encoder: embeds or compares the images.
        baseline: folder of the other run.
    """

    higher_is_better = False

    def __init__(self, encoder: Scorer | None = None, baseline: Folder = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.baseline = baseline
        self._paired: tuple[ImageSet, ImageSet] | None = None

    @cached_property
    def _baseline_images(self) -> ImageSet:
        return ImageSet.open(self.folder("baseline"))

    def settings(self) -> dict[str, Any]:
        """Identify the other run by the content of its images."""
        return {"baseline_sha256": self._baseline_images.only(self.only).manifest_hash}

    def paired(self, images: ImageSet) -> ImageSet:
        """Return the other run's images in the order of `images`; raise ValueError if groups or their sizes differ."""
        groups, rows = self._baseline_images.groups, self._baseline_images.rows
        missing = [group for group in images.groups if len(groups.get(group, ())) != len(images.groups[group])]
        if missing:
            raise ValueError(
                f"expected the groups of {images.folder} in {self.baseline} too, with as many images, got others for "
                f"{len(missing)} of them: {', '.join(missing[:5])}; compare runs of the same prompts"
            )
        positions = [position for group in images.groups for position in groups[group]]
        return images.with_images_of(ImageSet(self._baseline_images.folder, [rows[position] for position in positions]))

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, Any]:
        if self._paired is None or self._paired[0] is not images:
            self._paired = images, self.paired(images)
        ours, theirs = (self.encoder.of(image_set, positions) for image_set in self._paired)
        return ours, theirs


class Change(BaselineMetric):
    """Mean over a group's images of 1 - cosine with the baseline's image of the same seed."""

    name = "change"
    unit = "1 - cosine, 0 to 2"
    bounds = (0.0, 2.0)

    def score(self, images: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        # half the squared distance of unit vectors, which is exactly 0 for equal vectors
        _check_counts(images.shape, baseline.shape)
        return (unit_vectors(images) - unit_vectors(baseline)).square().sum(dim=-1).div(2)


class ChangedShare(BaselineMetric):
    """Share of a group's images that differ in any pixel from the baseline's image of the same seed."""

    name = "changed_share"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)
    encoder = Pixels()

    def __init__(self, baseline: Folder = None, **options: Any) -> None:
        super().__init__(None, baseline, **options)

    def score(self, images: Sequence[torch.Tensor], baseline: Sequence[torch.Tensor]) -> torch.Tensor:
        _check_counts([len(images)], [len(baseline)])
        return torch.tensor([not torch.equal(a, b) for a, b in zip(images, baseline, strict=True)])


def _check_counts(images: Sequence[int], baseline: Sequence[int]) -> None:
    if images != baseline:
        raise ValueError(
            f"expected as many of the baseline's images, got {list(images)} and {list(baseline)}; pair them"
        )
