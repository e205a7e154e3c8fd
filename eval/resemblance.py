"""How similar are images to references of protected concepts? Functions of embeddings, and the metrics.

The references are a folder with a subfolder of images per concept (a character, a logo, an artist's work). Images that
the method pushes away from only show whether it avoids these very images, so keep other images for measuring.
"""

import math
from abc import abstractmethod
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
    """Compute the cosine of every image [N, D] with every reference [R, D], R >= 1: float64 [N, R] in [-1, 1]."""
    if not (embeddings.ndim == references.ndim == 2 and embeddings.shape[1] == references.shape[1] and len(references)):
        raise ValueError(
            f"expected embeddings [N, D] and at least one reference [R, D], got {list(embeddings.shape)} and "
            f"{list(references.shape)}; embed both with one encoder"
        )
    return (unit_vectors(embeddings) @ unit_vectors(references).T).clamp(-1, 1)


def calibrate_threshold(negative: torch.Tensor | Sequence[float], false_positive_rate: float = 0.05) -> float:
    """Compute the lowest threshold that a new negative exceeds with at most the given probability.

    It is the ceil((1 - rate) (n + 1))-th smallest of n negatives. The rank of a new negative among n + 1 is uniform, so
    the rate holds for new images too; the (1 - rate) quantile would exceed it at small n.

    Args:
        negative: largest similarities [N] of held-out images without protected concepts, N >= 1 / rate - 1.
        false_positive_rate: in (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"expected a false positive rate between 0 and 1, got {false_positive_rate}; 0.05 is usual")
    negative = torch.as_tensor(negative, dtype=torch.float64).flatten()
    if not torch.isfinite(negative).all():
        raise ValueError("expected finite similarities, got NaN or infinity; look at the embeddings")
    # rounded first, because (1 - 0.05) * 20 is not exactly 19
    rank = math.ceil(round((1 - false_positive_rate) * (len(negative) + 1), 9))
    if rank > len(negative):
        needed = math.ceil(round(1 / false_positive_rate, 9)) - 1
        raise ValueError(
            f"expected at least {needed} negatives for a false positive rate of {false_positive_rate}, got "
            f"{len(negative)}; give more held-out images that show no asset, or allow a larger rate"
        )
    return negative.sort().values[rank - 1].item()


class ReferenceMetric(Metric):
    """A metric of images and references; the first arguments of `update` are N images and R references.

    Args:
        encoder: embeds the images.
        references: folder with a subfolder per protected concept.
    """

    higher_is_better: bool | None = False
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
        """The concept of each reference, which is the name of its subfolder, in the order of the embeddings."""
        return [row.category for row in self._references.rows]

    def require(self, images: ImageSet) -> None:
        super().require(images)
        _ = self._references

    def settings(self) -> dict[str, Any]:
        """Identify the references by their content."""
        return {**super().settings(), "references_sha256": self._references.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        name, n_assets = self._references.folder.name, len(set(self.assets))
        return {"references": name, "n_references": len(self.assets), "n_assets": n_assets}

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        if self._embeddings is None:
            self._embeddings = images.with_images_of(self._references).embeddings(self.encoder)
        return self.encoder.of(images, positions), self._embeddings


class RequestedConceptMetric(ReferenceMetric):
    """A metric of images and the protected concept that their prompt requests.

    The groups' categories are the names of concepts; other groups are left out. `update` takes N images, R references,
    the concept of each reference and the requested concept of each image, int [R] and [N].
    """

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        numbers = {asset: number for number, asset in enumerate(dict.fromkeys(self.assets))}
        wanted = [numbers[images.rows[position].category] for position in positions]
        assets = torch.tensor([numbers[asset] for asset in self.assets])
        return *super().inputs(images, positions), assets, torch.tensor(wanted)

    def score(
        self, embeddings: torch.Tensor, references: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        cosines = similarities(embeddings, references)
        if (*wanted.shape, *assets.shape) != cosines.shape:
            raise ValueError(
                f"expected an asset of each of {cosines.shape[1]} references and {cosines.shape[0]} images, got "
                f"{list(assets.shape)} and {list(wanted.shape)}"
            )
        return self.combine(cosines, assets, wanted)

    @abstractmethod
    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return a number [N] per image of the cosines [N, R], the concepts of references [R] and of prompts [N]."""

    def part(self, images: ImageSet) -> ImageSet:
        rows = [row for row in images.rows if row.category in self.assets]
        withheld = [row for row in images.withheld if row.category in self.assets]
        if not rows and not withheld:
            categories = sorted({row.category for row in images.rows})
            raise ValueError(
                f"expected images of the assets {sorted(set(self.assets))[:10]} for {self.name}, got the categories "
                f"{categories[:10]}; name the references' subfolders as the prompts' categories"
            )
        return replace(images, rows=rows, withheld=withheld)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        return super().per_group(self.part(images))

    def details(self, images: ImageSet) -> dict[str, Any]:
        left_out = {row.category for row in images.rows} - set(self.assets)
        return {**super().details(images), "categories_left_out": sorted(left_out)}


class MaximumResemblance(RequestedConceptMetric):
    """Mean over a group's images of the largest cosine with a reference of the requested concept."""

    name = "maximum_resemblance"
    version = 2
    unit = "cosine, -1 to 1"

    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cosines.masked_fill(assets != wanted[:, None], -torch.inf).amax(dim=1)


class MeanResemblance(RequestedConceptMetric):
    """Mean over a group's images of the mean cosine with the references of the requested concept."""

    name = "mean_resemblance"
    version = 2
    unit = "cosine, -1 to 1"

    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cosines.masked_fill(assets != wanted[:, None], torch.nan).nanmean(dim=1)


class FloorResemblance(RequestedConceptMetric):
    """Mean over a group's images of the similarity to concepts that the prompt does not request.

    The similarity to a concept is the largest cosine with its references, as in `MaximumResemblance`; the mean is over
    the other concepts. So it is the similarity of an image to a concept that it has nothing to do with.
    """

    name = "floor_resemblance"
    higher_is_better: bool | None = None
    unit = "cosine, -1 to 1"

    def require(self, images: ImageSet) -> None:
        super().require(images)
        if len(set(self.assets)) < 2:
            raise ValueError(
                f"{self.name} needs references of at least 2 concepts, got those of {sorted(set(self.assets))}; "
                "add more"
            )

    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self.by_concept(cosines, assets, wanted)[1]

    def by_concept(
        self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarity [N] to the requested concept, and the mean similarity [N] to the others."""
        concepts = assets.unique()
        maxima = torch.stack([cosines[:, assets == concept].amax(dim=1) for concept in concepts], dim=1)
        requested = concepts == wanted[:, None]
        return maxima[requested], maxima.masked_fill(requested, torch.nan).nanmean(dim=1)


class ExcessResemblance(FloorResemblance):
    """Mean over a group's images of the similarity to the requested concept, minus that to the other concepts.

    It has a natural zero: an image that is no more similar to the requested concept than to any other one.
    """

    name = "excess_resemblance"
    higher_is_better = False
    unit = "difference of cosines, -2 to 2"
    bounds = (-2.0, 2.0)

    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        requested, others = self.by_concept(cosines, assets, wanted)
        return requested - others


class AnyResemblance(ReferenceMetric):
    """Mean over a group's images of the largest cosine with a reference of any protected concept.

    It shows whether images that avoid one concept come closer to another. It grows with the number of references.
    """

    name = "any_resemblance"
    unit = "cosine, -1 to 1"

    def score(self, embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return similarities(embeddings, references).amax(dim=1)


class Likeness(AnyResemblance):
    """Mean over a group's images of the largest cosine with a real image, not below 0.

    It shows whether images that avoid a concept still look like images; noise avoids every concept.

    Args:
        encoder: embeds the images.
        reference: folder of real images.
    """

    name = "likeness"
    higher_is_better = True
    unit = "cosine, 0 to 1"
    bounds = (0.0, 1.0)

    def __init__(self, encoder: Scorer | None = None, reference: Folder = None, **options: Any) -> None:
        super().__init__(encoder, reference, **options)

    def score(self, embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return super().score(embeddings, references).clamp(min=0)


class Identification(RequestedConceptMetric):
    """Share of a group's images whose most similar reference shows the requested concept; 1 / concepts by chance."""

    name = "identification"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)

    def combine(self, cosines: torch.Tensor, assets: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return assets[cosines.argmax(dim=1)] == wanted

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Count the images by their most similar concept."""
        embeddings, references = ReferenceMetric.inputs(self, images, range(len(images.rows)))
        nearest = similarities(embeddings, references).argmax(dim=1).tolist()
        return {
            **super().details(images),
            "nearest": dict(sorted(Counter(self.assets[index] for index in nearest).items())),
        }


class DetectionRate(ReferenceMetric):
    """Share of a group's images whose largest cosine with a protected reference exceeds a calibrated threshold.

    `update` takes N images, R references and the threshold.

    Args:
        encoder: embeds the images.
        references: folder with a subfolder per protected concept.
        held_out: folder of other images to calibrate the threshold: subfolders named like a concept show it, all others
            show no concept.
        false_positive_rate: see `calibrate_threshold`.
    """

    name = "detection_rate"
    unit = "share of images, 0 to 1"
    bounds = (0.0, 1.0)
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
        references = dict(zip(self._references.hashes, self._references.rows, strict=True))
        pairs = zip(held_out.rows, held_out.hashes, strict=True)
        shared = [f"{row.path} is {references[digest].path}" for row, digest in pairs if digest in references]
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
            held_out = images.with_images_of(self._held_out)
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
        return {**super().details(images), **self.calibration(images)}
