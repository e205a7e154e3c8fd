"""How do a set of images and a set of real ones overlap? Their nearest neighbours, and the metrics.

Arithmetic on the features of some network, as in `eval.fidelity`, in float64. The numbers depend on both sizes, so only
sets of one size against one reference can be compared.

Precision and recall are those of Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (NeurIPS 2019), with k = 3: one outlier makes a large ball, and both grow with the set whose balls they are.
Density and coverage are those of Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (ICML
2020), with k = 5: balls only around real images, surface excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.encoders import Encoder
from eval.fidelity import ROWS, FidelityMetric, checked_pair, require_images
from eval.images import ManifestRow

# Distances of the same two points, computed in two products, differ by rounding. Ties are common (the k-th neighbour
# lies on the ball), so what is within this of equal is equal.
TIE = 1e-9
# Relative to the squared lengths: what differs by less than float32 resolves is one point.
SAME = 1e-10


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    centre = y.mean(dim=0)  # lengths from there are smaller than those from the origin, and so is the rounding
    x, y = x - centre, y - centre
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = lengths - 2 * x @ y.T
    return torch.where(distances < SAME * lengths, 0, distances)


class Manifold:
    """The balls around a set's points that reach to their k-th neighbours.

    Args:
        points: [M, D].
        k: which neighbour; M > k.
        what: the points are, for the error.
    """

    def __init__(self, points: torch.Tensor, k: int, what: str = "reference images") -> None:
        if k < 1:
            raise ValueError(f"expected a neighbour k >= 1, got {k}; 3 and 5 are usual")
        require_images(points, k + 1, what, f"each needs a neighbour number {k}")
        self.points = points.double()
        self.k = k
        # a point is its own nearest neighbour, hence k + 1
        nearest = [_squared_distances(x, self.points).kthvalue(k + 1, dim=1).values for x in self.points.split(ROWS)]
        self.radii = torch.cat(nearest)

    def holds(self, points: torch.Tensor, surface: bool) -> torch.Tensor:
        """Tell of each of N points which of the M balls it lies in: [N, D] -> bool [N, M]."""
        points, centres = checked_pair(points, self.points)
        require_images(points, 1, "images", "there is nothing to measure")
        distances = (_squared_distances(rows, centres) for rows in points.split(ROWS))
        if surface:
            return torch.cat([found <= self.radii * (1 + TIE) for found in distances])
        return torch.cat([found < self.radii * (1 - TIE) for found in distances])


def precision(features: torch.Tensor, real: Manifold) -> float:
    """Return which share of images [N, D] lies in a ball of the real ones, in [0, 1]; higher is better."""
    return real.holds(features, surface=True).any(dim=1).double().mean().item()


def recall(features: torch.Tensor, real: Manifold) -> float:
    """Return which share of the real ones lies in a ball of the images [N, D], N > k, in [0, 1]; higher is better."""
    return precision(real.points, Manifold(features, real.k, "images"))


def density(features: torch.Tensor, real: Manifold) -> float:
    """Return in how many real balls an image of [N, D] lies, over k: >= 0, 1 in expectation for equal distributions."""
    return real.holds(features, surface=False).sum(dim=1).double().mean().item() / real.k


def coverage(features: torch.Tensor, real: Manifold) -> float:
    """Return which share of the real balls holds an image of [N, D], in [0, 1]; higher is better."""
    return real.holds(features, surface=False).any(dim=0).double().mean().item()


class NeighbourMetric(FidelityMetric):
    """A measure of overlap of two sets by their nearest neighbours; `minimum` leaves every image a k-th neighbour.

    Attributes:
        overlap: what measures features, float64 [N, D], against the real ones.
        default_k: `k` where none is given: that of the paper.
    """

    version = 1
    higher_is_better = True
    bounds = (0.0, 1.0)
    overlap: Callable[[torch.Tensor, Manifold], float]
    default_k: int

    def __init__(self, encoder: Encoder, reference: str | Path, k: int | None = None, name: str | None = None) -> None:
        super().__init__(encoder, reference, name)
        self.k = self.default_k if k is None else k
        self.minimum = self.k + 1

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k}

    def summarise(self, reference: torch.Tensor) -> Manifold:
        return Manifold(reference, self.k)

    def compare(self, features: torch.Tensor, summary: Manifold, rows: Sequence[ManifestRow]) -> float:
        return self.overlap(features, summary)


class Precision(NeighbourMetric):
    """Share of images that are like a real one."""

    name = "precision"
    unit = "share of images, 0 to 1"
    description = "share of images within a real image's distance to its k-th real neighbour"
    overlap = staticmethod(precision)
    default_k = 3


class Recall(NeighbourMetric):
    """Share of real images that some image is like."""

    name = "recall"
    unit = "share of real images, 0 to 1"
    description = "share of real images within an image's distance to its k-th neighbour among the images"
    overlap = staticmethod(recall)
    default_k = 3


class Density(NeighbourMetric):
    """How deep in the real images' balls the images lie."""

    name = "density"
    bounds = (0.0, None)
    unit = "1 for equal distributions, >= 0"
    description = "mean over images of the real images within whose k-th neighbour they lie, over k"
    overlap = staticmethod(density)
    default_k = 5


class Coverage(NeighbourMetric):
    """Share of the real images' balls that the images reach."""

    name = "coverage"
    unit = "share of real images, 0 to 1"
    description = "share of real images with an image nearer than their k-th real neighbour"
    overlap = staticmethod(coverage)
    default_k = 5
