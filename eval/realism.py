"""How much does a single image look like real ones? The realism score of Kynkaanniemi et al. (NeurIPS 2019)."""

from collections.abc import Sequence
from typing import Any

import torch

from eval.encoders import Scorer
from eval.fidelity import Manifold, ReferenceMetric
from eval.imageset import ImageSet
from eval.metric import Folder


class Realism(ReferenceMetric):
    """Realism score: the largest ratio, over real images, of a real image's radius to its distance from the image.

    The radius of a real image is the distance to its k-th real neighbour. As in the paper, the half of the real images
    with the larger radii is left out, since these lie where there are few. At least 1 means within a radius.

    On the features of an early layer, which are textures and edges, it falls where images are blurred or noisy and does
    not react to mirroring or shifts. CLIPScore reacts the other way round; see docs/metrics.md.

    Args:
        encoder: embeds the images and the real images.
        reference: folder of more than k real images: a run, one subfolder a category, or images without subfolders.
        k: which neighbour; 3 is the paper's.
    """

    name = "realism"
    higher_is_better = True
    unit = "ratio of distances, >= 0"
    bounds = (0.0, None)
    description = "largest ratio of a real image's k-th neighbour's distance to its distance from the image"
    SETTINGS = ("k",)

    def __init__(self, encoder: Scorer | None = None, reference: Folder = None, k: int = 3, **options: Any) -> None:
        super().__init__(encoder, reference, **options)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self._manifold: Manifold | None = None

    def require(self, images: ImageSet) -> None:
        super().require(images)
        if (n_real := len(self.real.rows)) <= self.k:
            raise ValueError(
                f"{self.name} needs more than {self.k} reference images, got {n_real} in {self.real.folder}; give more"
            )

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[torch.Tensor, Manifold]:
        if self._manifold is None:  # once for all groups
            self._manifold = Manifold(self.embed_real(images), self.k)
        return self.encoder.of(images, positions), self._manifold

    def score(self, features: torch.Tensor, reference: torch.Tensor | Manifold) -> torch.Tensor:
        """Score N images, [N, D], by M real ones, [M, D] or their manifold: float64 [N]."""
        manifold = reference if isinstance(reference, Manifold) else Manifold(reference, self.k)
        dense = manifold.radii <= manifold.radii.median()
        squared = torch.cat([distances.clamp(min=tie.max()) for distances, tie in manifold.distances(features)])
        return (manifold.radii / squared)[:, dense].amax(dim=1).sqrt()
