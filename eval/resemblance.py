"""How much do images look like a set of protected references? Pure functions on embeddings, and the metrics.

The references are a folder with one subfolder an asset (a character, a logo, an artist's picture), some images in
each. Those that a method was given (as its negative, say) measure only whether it avoids those very images: keep some
of each asset for measuring.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from eval.encoders import Scorer, unit_vectors
from eval.imageset import ImageSet
from eval.intervals import GroupValue
from eval.metric import Folder, Metric


def similarities(embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every image, [N, D], and every reference, [R, D], R >= 1: float64 [N, R] in [-1, 1]."""
    if not (embeddings.ndim == references.ndim == 2 and embeddings.shape[1] == references.shape[1] and len(references)):
        raise ValueError(
            f"expected embeddings [N, D] and at least one reference [R, D], got {list(embeddings.shape)} and "
            f"{list(references.shape)}; embed both with one encoder"
        )
    return (unit_vectors(embeddings) @ unit_vectors(references).T).clamp(-1, 1)


def calibrate_threshold(negative: torch.Tensor | Sequence[float], false_positive_rate: float = 0.05) -> float:
    """Choose the lowest threshold that a new negative exceeds with at most the given probability.

    It is the ceil((1 - rate) (n + 1))-th smallest of n negatives. If the new one is drawn like them, its rank among
    n + 1 is uniform, so that the promise holds for new images and not only for these; the (1 - rate) quantile
    promises less at small n.

    Args:
        negative: largest similarities [N] of held-out images that show none of the assets, N >= 1 / rate - 1.
        false_positive_rate: in (0, 1).
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


class ReferenceMetric(Metric):
    """A metric of images and a set of references; `update` takes N images and R references first.

    Args:
        references: folder with one subfolder an asset.
    """

    # more resemblance is what protection is to prevent
    higher_is_better = False
    bounds = (-1.0, 1.0)

    def __init__(self, encoder: Scorer | None = None, references: Folder = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.references = references
        self._embeddings: torch.Tensor | None = None

    @cached_property
    def _references(self) -> ImageSet:
        return ImageSet.open(self.folder("references"))

    @cached_property
    def assets(self) -> list[str]:
        """The asset of each reference, in the order of their embeddings: the name of its subfolder."""
        return [row.category for row in self._references.rows]

    def require(self, images: ImageSet) -> None:
        super().require(images)
        _ = self._references

    def settings(self) -> dict[str, Any]:
        """Identify the references by their content, wherever they lie."""
        return {**super().settings(), "references_sha256": self._references.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        name, n_assets = self._references.folder.name, len(set(self.assets))
        return {"references": name, "n_references": len(self.assets), "n_assets": n_assets}

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        """Return the images' and the references' embeddings, which are made through the cache of `images`."""
        if self._embeddings is None:
            self._embeddings = images.beside(self._references).embeddings(self.encoder)
        return self.encoder.of(images, positions), self._embeddings


class AskedMetric(ReferenceMetric):
    """A metric of images and the asset that their prompt asks for.

    The groups' categories are the assets' names; groups of other categories are left out. `update` takes, beside, the
    assets of the references and those asked for, int [R] and [N].
    """

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        numbers = {asset: number for number, asset in enumerate(dict.fromkeys(self.assets))}
        wanted = [numbers[images.rows[position].category] for position in positions]
        assets = torch.tensor([numbers[asset] for asset in self.assets])
        return *super().inputs(images, positions), assets, torch.tensor(wanted)

    def part(self, images: ImageSet) -> ImageSet:
        asked, withheld = (
            [row for row in rows if row.category in self.assets] for rows in (images.rows, images.withheld)
        )
        if not asked and not withheld:
            found = sorted({row.category for row in images.rows})
            raise ValueError(
                f"expected images of the assets {sorted(set(self.assets))[:10]} for {self.name}, got the categories "
                f"{found[:10]}; name the references' subfolders as the prompts' categories"
            )
        return replace(images, rows=asked, withheld=withheld)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        return super().per_group(self.part(images))

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say which categories are no assets."""
        left_out = {row.category for row in images.rows} - set(self.assets)
        return {**super().details(images), "categories_left_out": sorted(left_out)}


class MaximumResemblance(AskedMetric):
    """Mean over a group's images of the largest similarity with a reference of the asset asked for."""

    name = "maximum_resemblance"
    version = 2
    unit = "cosine, -1 to 1"
    description = "mean over a group's images of the largest cosine with a reference of the asset asked for"

    def score(
        self, embeddings: torch.Tensor, references: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        return _of_asked(embeddings, references, assets, wanted).nan_to_num(-torch.inf).amax(dim=1)


class MeanResemblance(AskedMetric):
    """Mean over a group's images of the mean similarity with the references of the asset asked for."""

    name = "mean_resemblance"
    version = 2
    unit = "cosine, -1 to 1"
    description = "mean over a group's images of the mean cosine with the references of the asset asked for"

    def score(
        self, embeddings: torch.Tensor, references: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        return _of_asked(embeddings, references, assets, wanted).nanmean(dim=1)


def _of_asked(
    embeddings: torch.Tensor, references: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return `similarities`, [N, R], NaN with the references of other assets than the image's."""
    cosines = similarities(embeddings, references)
    others = ~_asked(cosines, assets, wanted)
    if others.all(dim=1).any():
        raise ValueError("expected references of every asset that is asked for, got images of which there is none")
    return cosines.masked_fill(others, torch.nan)


def _asked(cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Tell which references are of the asset that is asked for, bool [N, R]."""
    if (*wanted.shape, *assets.shape) != cosines.shape:
        raise ValueError(
            f"expected an asset of each of {cosines.shape[1]} references and {cosines.shape[0]} images, got "
            f"{list(assets.shape)} and {list(wanted.shape)}"
        )
    return assets == wanted[:, None]


class AnyResemblance(ReferenceMetric):
    """Mean over a group's images of the largest similarity with a reference of any asset.

    Away from one asset an image may come nearer to another, which the resemblance to the one asked for does not see. It
    grows with the number of references.
    """

    name = "any_resemblance"
    unit = "cosine, -1 to 1"
    description = "mean over a group's images of the largest cosine with a reference of any protected asset"

    def score(self, embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return similarities(embeddings, references).amax(dim=1)


class Likeness(AnyResemblance):
    """Mean over a group's images of the largest similarity with a real image, not below 0.

    What is left of a picture: noise resembles no protected asset, and nothing else either.

    Args:
        reference: folder of real images.
    """

    name = "likeness"
    higher_is_better = True
    unit = "cosine, 0 to 1"
    bounds = (0.0, 1.0)
    description = "mean over a group's images of the largest cosine with a real image"

    def __init__(self, encoder: Scorer | None = None, reference: Folder = None, **options: Any) -> None:
        super().__init__(encoder, reference, **options)

    def score(self, embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return super().score(embeddings, references).clamp(min=0)


class Identification(AskedMetric):
    """Share of a group's images whose most similar reference is of the asset asked for; by chance, 1 / assets."""

    name = "identification"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)
    description = "share of a group's images whose nearest reference is of the asset named by their category"

    def score(
        self, embeddings: torch.Tensor, references: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        cosines = similarities(embeddings, references)
        return _asked(cosines, assets, wanted).gather(1, cosines.argmax(dim=1, keepdim=True)).flatten()

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say which assets the images resemble most."""
        embeddings, references = ReferenceMetric.inputs(self, images, range(len(images.rows)))
        nearest = similarities(embeddings, references).argmax(dim=1).tolist()
        return {
            **super().details(images),
            "nearest": dict(sorted(Counter(self.assets[index] for index in nearest).items())),
        }


class DetectionRate(ReferenceMetric):
    """Share of a group's images that resemble some reference more than images without the assets do.

    `update` takes, beside, the threshold.

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
    SETTINGS = ("false_positive_rate",)

    def __init__(
        self,
        encoder: Scorer | None = None,
        references: Folder = None,
        held_out: Folder = None,
        false_positive_rate: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(encoder, references, **options)
        self.held_out = held_out
        self.false_positive_rate = false_positive_rate
        self._calibration: dict[str, Any] = {}

    @cached_property
    def _held_out(self) -> ImageSet:
        held_out = ImageSet.open(self.folder("held_out"))
        known = dict(zip(self._references.hashes, self._references.rows, strict=True))
        pairs = zip(held_out.rows, held_out.hashes, strict=True)
        shared = [f"{row.path} is {known[digest].path}" for row, digest in pairs if digest in known]
        if shared:
            raise ValueError(
                f"expected held-out images that are no references for {self.name}, got {len(shared)} that are in both "
                f"folders: {', '.join(shared[:10])}; an image resembles itself wholly and moves the threshold: remove "
                "it from one of them"
            )
        return held_out

    def require(self, images: ImageSet) -> None:
        super().require(images)
        n_negative = sum(row.category not in self.assets for row in self._held_out.rows)
        calibrate_threshold([0.0] * n_negative, self.false_positive_rate)  # which says how many it needs

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "held_out_sha256": self._held_out.manifest_hash}

    def calibration(self, images: ImageSet) -> dict[str, Any]:
        """Return the threshold and what it makes of the held-out images."""
        if not self._calibration:
            held_out = images.beside(self._held_out)
            maxima = similarities(*super().inputs(held_out, range(len(held_out.rows)))).amax(dim=1)
            shows = torch.tensor([row.category in self.assets for row in held_out.rows])
            positive, negative = maxima[shows], maxima[~shows]
            threshold = calibrate_threshold(negative, self.false_positive_rate)
            self._calibration = {
                "threshold": threshold,
                "true_positive_rate": (positive > threshold).double().mean().item() if len(positive) else None,
                "n_positive": len(positive),
                "n_negative": len(negative),
            }
        return self._calibration

    def score(self, embeddings: torch.Tensor, references: torch.Tensor, threshold: float) -> torch.Tensor:
        return similarities(embeddings, references).amax(dim=1) > threshold

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        return *super().inputs(images, positions), self.calibration(images)["threshold"]

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how the threshold came about."""
        return {**super().details(images), **self.calibration(images)}
