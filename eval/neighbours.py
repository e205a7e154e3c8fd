"""How do a set of images and a set of real ones overlap? Their nearest neighbours, and the metrics.

Arithmetic on the features of some network, as in `eval.fidelity`, in float64. The numbers depend on both sizes, so only
sets of one size against one reference can be compared.

Precision and recall are those of Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (NeurIPS 2019), with k = 3: one outlier makes a large ball, and both grow with the set whose balls they are.
Density and coverage are those of Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (ICML
2020), with k = 5: balls only around real images, surface excluded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eval.encoders import Scorer
from eval.fidelity import ROWS, FidelityMetric, Rows, checked_pair, require_images


class Manifold:
    """The balls around a set's points that reach to their k-th neighbours.

    Distances are of differences, not of products, whose rounding would tear ties: the k-th neighbour lies on the ball.

    Args:
        points: [M, D].
        k: which neighbour; M > k.
        what: the points are, for the error.
    """

    def __init__(self, points: torch.Tensor, k: int, what: str = "reference images") -> None:
        require_images(points, k + 1, what, f"each needs a neighbour number {k}")
        self.points = points.double()
        self.k = k
        # a point is its own nearest neighbour, hence k + 1
        self.radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in self.distances(points)])

    def distances(self, points: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the distances of some of N points to each of the M, [.., M]."""
        points, centres = checked_pair(points, self.points)
        require_images(points, 1, "images", "there is nothing to measure")
        for rows in points.split(ROWS):
            yield torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")

    def holds(self, points: torch.Tensor, surface: bool) -> torch.Tensor:
        """Tell of each of N points which of the M balls it lies in: [N, D] -> bool [N, M]."""
        within = torch.le if surface else torch.lt
        return torch.cat([within(distances, self.radii) for distances in self.distances(points)])


class NeighbourMetric(FidelityMetric):
    """A measure of overlap of two sets by their nearest neighbours; `minimum` leaves every image a k-th neighbour.

    Attributes:
        default_k: `k` where none is given: that of the paper.
    """

    version = 1
    higher_is_better = True
    bounds = (0.0, 1.0)
    default_k: int

    def __init__(
        self,
        encoder: Scorer | None = None,
        reference: str | Path | None = None,
        k: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(encoder, reference, **options)
        self.k = self.default_k if k is None else k
        if self.k < 1:
            raise ValueError(f"expected a neighbour k >= 1, got {k}; 3 and 5 are usual")
        self.minimum = self.k + 1

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k}

    def summarise(self, reference: torch.Tensor, rows: Rows = None) -> Manifold:
        return Manifold(reference, self.k)


class Precision(NeighbourMetric):
    """Share of images that lie in a ball of a real one."""

    name = "precision"
    unit = "share of images, 0 to 1"
    description = "share of images within a real image's distance to its k-th real neighbour"
    default_k = 3

    def score(self, features: torch.Tensor, summary: Manifold, rows: Rows = None) -> float:
        return summary.holds(features, surface=True).any(dim=1).double().mean().item()


class Recall(NeighbourMetric):
    """Share of real images that lie in a ball of an image."""

    name = "recall"
    unit = "share of real images, 0 to 1"
    description = "share of real images within an image's distance to its k-th neighbour among the images"
    default_k = 3

    def score(self, features: torch.Tensor, summary: Manifold, rows: Rows = None) -> float:
        return (
            Manifold(features, self.k, "images").holds(summary.points, surface=True).any(dim=1).double().mean().item()
        )


class Density(NeighbourMetric):
    """In how many real images' balls an image lies, over k: 1 in expectation for equal distributions."""

    name = "density"
    bounds = (0.0, None)
    unit = "1 for equal distributions, >= 0"
    description = "mean over images of the real images within whose k-th neighbour they lie, over k"
    default_k = 5

    def score(self, features: torch.Tensor, summary: Manifold, rows: Rows = None) -> float:
        return summary.holds(features, surface=False).sum(dim=1).double().mean().item() / self.k


class Coverage(NeighbourMetric):
    """Share of the real images' balls that hold an image."""

    name = "coverage"
    unit = "share of real images, 0 to 1"
    description = "share of real images with an image nearer than their k-th real neighbour"
    default_k = 5

    def score(self, features: torch.Tensor, summary: Manifold, rows: Rows = None) -> float:
        return summary.holds(features, surface=False).any(dim=0).double().mean().item()
