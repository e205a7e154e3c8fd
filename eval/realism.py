"""How much does a single image look like real ones? The realism score of Kynkaanniemi et al. (NeurIPS 2019)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.encoders import Scorer
from eval.fidelity import Manifold
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.metric import Folder, Metric


class Realism(Metric):
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
        super().__init__(encoder, **options)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.reference = reference
        self.k = k

    @cached_property
    def real(self) -> ImageSet:
        folder = Path(self.folder("reference"))
        return ImageSet(folder, read_manifest(folder, flat=True))

    def require(self, images: ImageSet) -> None:
        super().require(images)
        if (n_real := len(self.real.rows)) <= self.k:
            raise ValueError(
                f"{self.name} needs more than {self.k} reference images, got {n_real} in {self.real.folder}; give more"
            )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "reference_sha256": self.real.manifest_hash}

    def per_group(self, images: ImageSet) -> list[Any]:
        self.require(images)
        self._reference_features = images.with_images_of(self.real).embeddings(self.encoder)
        return super().per_group(images)

    def inputs(self, images: ImageSet, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder.of(images, positions), self._reference_features

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Score N images, [N, D], by M real ones, [M, D]: float64 [N]."""
        manifold = Manifold(reference, self.k)
        dense = manifold.radii <= manifold.radii.median()
        squared = torch.cat([distances.clamp(min=tie.max()) for distances, tie in manifold.distances(features)])
        return (manifold.radii / squared)[:, dense].amax(dim=1).sqrt()
