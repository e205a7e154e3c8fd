"""How much do images look like a set of protected references? Pure functions on embeddings, and the metrics.

The references are a folder with one subfolder an asset (a character, a logo, an artist's picture), some images in
each. Similarity is the cosine. The maximum over references says whether an image resembles any of them; the mean says
how near it is to all of them, and moves with anything that images have in common.

References that a method was given (as its negative, say) measure only whether it avoids those very images: keep
some of each asset for measuring.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.aggregates import GroupValue
from eval.encoders import Encoder
from eval.files import remembered_hash
from eval.imageset import ImageSet
from eval.metric import ImageMetric


def similarities(embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every image, [N, D], and every reference, [R, D], R >= 1: float64 [N, R] in [-1, 1]."""
    if not (embeddings.ndim == references.ndim == 2 and embeddings.shape[1] == references.shape[1] and len(references)):
        raise ValueError(
            f"expected embeddings [N, D] and at least one reference [R, D], got {list(embeddings.shape)} and "
            f"{list(references.shape)}; embed both with one encoder"
        )
    x, y = embeddings.double(), references.double()
    norms = torch.cat([x.norm(dim=-1), y.norm(dim=-1)])
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("expected finite embeddings that are not zero, got others; cosine is undefined for them")
    return (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T).clamp(-1, 1)


def calibrate_threshold(negative: torch.Tensor | Sequence[float], false_positive_rate: float = 0.05) -> float:
    """Choose the lowest threshold that a new negative exceeds with at most the given probability.

    It is the ceil((1 - rate) (n + 1))-th smallest of n negatives. If the new one is drawn like them, its rank among
    n + 1 is uniform, so that the promise holds for new images and not only for these; the (1 - rate) quantile
    promises less at small n.

    Args:
        negative: largest similarities [N] of held-out images that show none of the assets.
        false_positive_rate: in (0, 1).

    Raises:
        ValueError: too few negatives for the rate: 1 / rate - 1 are needed.
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"expected a false positive rate between 0 and 1, got {false_positive_rate}; 0.05 is usual")
    negative = torch.as_tensor(negative, dtype=torch.float64).flatten()
    if not torch.isfinite(negative).all():
        raise ValueError("expected finite similarities, got NaN or infinity; look at the embeddings")
    # rounded first: (1 - 0.05) * 20 is not quite 19
    rank = math.ceil(round((1 - false_positive_rate) * (len(negative) + 1), 9))
    if rank > len(negative):
        needed = math.ceil(round(1 / false_positive_rate, 9)) - 1
        raise ValueError(
            f"expected at least {needed} negatives for a false positive rate of {false_positive_rate}, got "
            f"{len(negative)}; give more held-out images that show no asset, or allow a larger rate"
        )
    return negative.sort().values[rank - 1].item()


class ReferenceMetric(ImageMetric):
    """A metric of images and a set of references.

    Args:
        references: folder with one subfolder an asset.
    """

    version = 1
    # more resemblance is what protection is to prevent
    higher_is_better: bool | None = False
    bounds = (-1.0, 1.0)

    def __init__(self, encoder: Encoder, references: str | Path, name: str | None = None) -> None:
        super().__init__(encoder, name)
        self.references = Path(references)
        self._embeddings: torch.Tensor | None = None

    @cached_property
    def _references(self) -> ImageSet:
        return ImageSet.open(self.references)

    @cached_property
    def assets(self) -> list[str]:
        """The asset of each reference, in the order of their embeddings: the name of its subfolder."""
        return [row.category for row in self._references.rows]

    def settings(self) -> dict[str, Any]:
        """Identify the references by their content, wherever they lie."""
        return {"references_sha256": self._references.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many assets and references there are."""
        return {
            "references": self.references.name,
            "n_references": len(self.assets),
            "n_assets": len(set(self.assets)),
        }

    def prepare(self) -> None:
        """Read the folders that the settings tell of, and load the encoder."""
        _ = self.settings()
        super().prepare()

    def similarities(self, images: ImageSet) -> torch.Tensor:
        """Return the `similarities` of images and references, which are embedded through the cache of `images`."""
        if self._embeddings is None:
            self._embeddings = images.beside(self._references).embeddings(self.encoder)
        return similarities(images.embeddings(self.encoder), self._embeddings)


class MaximumResemblance(ReferenceMetric):
    """Mean over a group's images of the largest similarity with a reference."""

    name = "maximum_resemblance"
    unit = "cosine, -1 to 1"
    description = "mean over a group's images of the largest cosine with a protected reference"

    def scores(self, images: ImageSet) -> torch.Tensor:
        return self.similarities(images).amax(dim=1)


class MeanResemblance(ReferenceMetric):
    """Mean over a group's images of the mean similarity with the references."""

    name = "mean_resemblance"
    unit = "cosine, -1 to 1"
    description = "mean over a group's images of the mean cosine with the protected references"

    def scores(self, images: ImageSet) -> torch.Tensor:
        return self.similarities(images).mean(dim=1)


class Identification(ReferenceMetric):
    """Share of a group's images whose most similar reference is of the asset that their prompt asks for.

    The groups' categories are the assets' names; groups of other categories are left out. Chance is about one over
    the number of assets.
    """

    name = "identification"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)
    description = "share of a group's images whose nearest reference is of the asset named by their category"

    def _nearest(self, images: ImageSet) -> list[str]:
        return [self.assets[index] for index in self.similarities(images).argmax(dim=1).tolist()]

    def scores(self, images: ImageSet) -> torch.Tensor:
        pairs = zip(self._nearest(images), images.rows, strict=True)
        return torch.tensor([asset == row.category for asset, row in pairs])

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        assets = set(self.assets)
        values = [group for group in super().per_group(images) if group["category"] in assets]
        if not values:
            found = sorted({row.category for row in images.rows})
            raise ValueError(
                f"expected images of the assets {sorted(assets)[:10]} for {self.name}, got the categories "
                f"{found[:10]}; name the references' subfolders as the prompts' categories"
            )
        return values

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say which assets the images resemble most, and which categories are no assets."""
        categories = {row.category for row in images.rows}
        return {
            **super().details(images),
            "nearest": dict(sorted(Counter(self._nearest(images)).items())),
            "categories_left_out": sorted(categories - set(self.assets)),
        }


class DetectionRate(ReferenceMetric):
    """Share of a group's images that resemble some reference more than images without the assets do.

    Args:
        references: folder with one subfolder an asset.
        held_out: folder with one subfolder a kind of image, to calibrate the threshold on: subfolders named like an
            asset show it, all others show none. An image that is also among the references is an error.
        false_positive_rate: of `calibrate_threshold`.
    """

    name = "detection_rate"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)
    description = "share of a group's images whose largest cosine with a protected reference is above the threshold"

    def __init__(
        self,
        encoder: Encoder,
        references: str | Path,
        held_out: str | Path,
        false_positive_rate: float = 0.05,
        name: str | None = None,
    ) -> None:
        super().__init__(encoder, references, name)
        self.held_out = Path(held_out)
        self.false_positive_rate = false_positive_rate
        self._calibration: dict[str, Any] = {}

    @cached_property
    def _held_out(self) -> ImageSet:
        held_out = ImageSet.open(self.held_out)
        known = {remembered_hash(self.references / row.path): row.path for row in self._references.rows}
        pairs = ((row.path, known.get(remembered_hash(self.held_out / row.path))) for row in held_out.rows)
        shared = [f"{path} is {reference}" for path, reference in pairs if reference]
        if shared:
            raise ValueError(
                f"expected held-out images that are no references for {self.name}, got {len(shared)} that are in both "
                f"folders: {', '.join(shared[:10])}; an image resembles itself wholly and moves the threshold: remove "
                "it from one of them"
            )
        return held_out

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "held_out_sha256": self._held_out.manifest_hash,
            "false_positive_rate": self.false_positive_rate,
        }

    def calibration(self, images: ImageSet) -> dict[str, Any]:
        """Return the threshold and what it makes of the held-out images."""
        if not self._calibration:
            maxima = self.similarities(images.beside(self._held_out)).amax(dim=1)
            shows = torch.tensor([row.category in self.assets for row in self._held_out.rows])
            positive, negative = maxima[shows], maxima[~shows]
            threshold = calibrate_threshold(negative, self.false_positive_rate)
            self._calibration = {
                "threshold": threshold,
                "true_positive_rate": (positive > threshold).double().mean().item() if len(positive) else None,
                "n_positive": len(positive),
                "n_negative": len(negative),
            }
        return self._calibration

    def scores(self, images: ImageSet) -> torch.Tensor:
        return self.similarities(images).amax(dim=1) > self.calibration(images)["threshold"]

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how the threshold came about."""
        return {**super().details(images), **self.calibration(images)}
