"""How do a set of images and a set of real ones overlap? Their nearest neighbours, and the metrics.

Arithmetic on the features of some network, as in `eval.fidelity`, in float64. The numbers depend on both sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.encoders import Encoder
from eval.fidelity import ROWS, FidelityMetric, checked_pair, require_images
from eval.images import ManifestRow


class Neighbours:
    """Squared distances around a reference set, shared by the four measures of its manifold.

    Args:
        reference: float64 [M, D].
        k: which neighbour gives a ball its radius; M > k.
    """

    # Distances of the same two points, computed in two products, differ by rounding. Ties are common (the k-th
    # neighbour lies on the ball), so what is within this of equal is equal.
    TIE = 1e-9
    # relative to the squared lengths: what differs by less than float32 resolves is one point
    SAME = 1e-10

    def __init__(self, reference: torch.Tensor, k: int) -> None:
        if k < 1:
            raise ValueError(f"expected a neighbour k >= 1, got {k}; 3 and 5 are usual")
        require_images(reference, k + 1, "reference images", f"each needs a neighbour number {k}")
        self.k = k
        # distances from the centre are smaller than those from the origin, and so is the rounding
        self.centre = reference.mean(dim=0)
        self.reference = reference - self.centre
        self.radii = self._radii(self.reference)

    def _squared(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
        distances = lengths - 2 * x @ y.T
        return torch.where(distances < self.SAME * lengths, 0, distances)

    def _radii(self, x: torch.Tensor) -> torch.Tensor:
        # a point is its own nearest neighbour, hence k + 1
        return torch.cat([self._squared(rows, x).kthvalue(self.k + 1, dim=1).values for rows in x.split(ROWS)])

    def _covered(self, points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
        """Share of points that lie in at least one ball, its surface included."""
        inside = [
            (self._squared(rows, centres) <= radii * (1 + self.TIE)).any(dim=1).double() for rows in points.split(ROWS)
        ]
        return torch.cat(inside).mean().item()

    def precision(self, features: torch.Tensor) -> float:
        return self._covered(features - self.centre, self.reference, self.radii)

    def recall(self, features: torch.Tensor) -> float:
        require_images(features, self.k + 1, "images", f"each needs a neighbour number {self.k}")
        centred = features - self.centre
        return self._covered(self.reference, centred, self._radii(centred))

    def density(self, features: torch.Tensor) -> float:
        balls = [
            (self._squared(rows, self.reference) < self.radii * (1 - self.TIE)).double().sum(dim=1)
            for rows in (features - self.centre).split(ROWS)
        ]
        return torch.cat(balls).mean().item() / self.k

    def coverage(self, features: torch.Tensor) -> float:
        centred = features - self.centre
        nearest = torch.cat([self._squared(rows, centred).amin(dim=1) for rows in self.reference.split(ROWS)])
        return (nearest < self.radii * (1 - self.TIE)).double().mean().item()


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Return which share of images is like a real one, and which share of real ones is like some image.

    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (NeurIPS 2019): a set
    covers the balls around its points that reach to the k-th neighbour, surface included. One outlier makes a large
    ball; both grow with the set whose balls they are.

    Args:
        features: [N, D], N > k.
        reference: [M, D], M > k.
        k: 3 in the paper.

    Returns:
        Precision and recall, both in [0, 1], higher is better.
    """
    features, reference = checked_pair(features, reference)
    neighbours = Neighbours(reference, k)
    return neighbours.precision(features), neighbours.recall(features)


def density_coverage(features: torch.Tensor, reference: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """Return how deep in the real images' balls the images lie, and which share of these balls they reach.

    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (ICML 2020). Balls only around real
    images, surface excluded.

    Args:
        features: [N, D], N >= 1.
        reference: [M, D], M > k.
        k: 5 in the paper.

    Returns:
        Density, >= 0, 1 in expectation for equal distributions; coverage in [0, 1]. Higher is better for both.
    """
    features, reference = checked_pair(features, reference)
    require_images(features, 1, "images", "there is nothing to measure")
    neighbours = Neighbours(reference, k)
    return neighbours.density(features), neighbours.coverage(features)


class NeighbourMetric(FidelityMetric):
    """A measure of overlap of two sets by their nearest neighbours.

    `minimum` leaves every image a k-th neighbour. That is arithmetic, not statistics: the numbers depend on both
    sizes, so only sets of one size against one reference can be compared.

    Attributes:
        overlap: the method of `Neighbours` that measures it.
        default_k: `k` where none is given: that of the paper.
    """

    version = 1
    higher_is_better = True
    bounds = (0.0, 1.0)
    overlap: str
    default_k: int

    def __init__(self, encoder: Encoder, reference: str | Path, k: int | None = None, name: str | None = None) -> None:
        super().__init__(encoder, reference, name)
        self.k = self.default_k if k is None else k
        self.minimum = self.k + 1

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k}

    def summarise(self, reference: torch.Tensor) -> Neighbours:
        return Neighbours(reference, self.k)

    def compare(self, features: torch.Tensor, summary: Neighbours, rows: Sequence[ManifestRow]) -> float:
        return getattr(summary, self.overlap)(features)


class Precision(NeighbourMetric):
    """Share of images that lie within the real ones' neighbourhoods; see `precision_recall`."""

    name = overlap = "precision"
    unit = "share of images, 0 to 1"
    description = "share of images within a real image's distance to its k-th real neighbour"
    default_k = 3


class Recall(NeighbourMetric):
    """Share of real images that lie within the images' neighbourhoods; see `precision_recall`."""

    name = overlap = "recall"
    unit = "share of real images, 0 to 1"
    description = "share of real images within an image's distance to its k-th neighbour among the images"
    default_k = 3


class Density(NeighbourMetric):
    """How many real images' neighbourhoods an image lies in; see `density_coverage`."""

    name = overlap = "density"
    bounds = (0.0, None)
    unit = "1 for equal distributions, >= 0"
    description = "mean over images of the real images within whose k-th neighbour they lie, over k"
    default_k = 5


class Coverage(NeighbourMetric):
    """Share of real images that have an image within their neighbourhood; see `density_coverage`."""

    name = overlap = "coverage"
    unit = "share of real images, 0 to 1"
    description = "share of real images with an image nearer than their k-th real neighbour"
    default_k = 5
