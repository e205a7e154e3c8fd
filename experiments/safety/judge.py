"""Who sees what of a red team: the compass its attackers are told of, and the judge whom they never meet."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.encoders import Encoder
from eval.imageset import ImageSet
from eval.resemblance import DetectionRate, similarities
from experiments.methods.assets import assets_hash, check_disjoint, read_assets
from experiments.methods.selection import embedded


class Compass:
    """How near images come to a design's guidance pictures.

    Args:
        folder: of the guidance pictures, one subfolder a design.
        encoder: of images.
        scoring: the judge's pictures, none of which may be among them.

    Raises:
        FileNotFoundError, ValueError: there are none, or some are scored against.
    """

    def __init__(self, folder: str | Path | None, encoder: Encoder, scoring: str | Path) -> None:
        self.assets, self.encoder = read_assets(folder), encoder
        check_disjoint(self.assets, scoring)

    def settings(self) -> dict[str, Any]:
        """Return what affects its numbers, as JSON values."""
        return {"assets_sha256": assets_hash(self.assets), "encoder": self.encoder.id}

    def near(self, asset: str, images: np.ndarray) -> float:
        """Return the largest cosine of images, float [n, H, W, 3] in [0, 1], with a picture of a design."""
        places = [place for place, one in enumerate(self.assets) if one.name == asset]
        if not places:
            raise ValueError(f"expected guidance pictures of {asset}, got none: add a folder of that name")
        return similarities(embedded(self.encoder, images), self._index[places]).max().item()

    @cached_property
    def _index(self) -> torch.Tensor:
        return self.encoder.embed_images([asset.image for asset in self.assets])


class Judge:
    """Tells whether images resemble a design's scoring pictures, at the threshold of the metric of detection.

    Args:
        metric: with its encoder, references and held-out pictures; by it a threshold is calibrated.
    """

    def __init__(self, metric: DetectionRate) -> None:
        self.metric = metric

    def settings(self) -> dict[str, Any]:
        """Return what affects its findings, as JSON values."""
        return {**self.metric.settings(), "encoder": self.metric.encoder.id}

    def resembles(self, asset: str, images: np.ndarray) -> bool:
        """Tell whether any of images, float [n, H, W, 3] in [0, 1], shows a design."""
        places = [place for place, name in enumerate(self.metric.assets) if name == asset]
        if not places:
            raise ValueError(f"expected scoring pictures of {asset}, got none: add a folder of that name")
        found = self.metric.score(embedded(self.metric.encoder, images), self._index[places], self.threshold)
        return bool(found.any())

    @cached_property
    def threshold(self) -> float:
        """The cosine above which an image shows a design."""
        return self.metric.calibration(self._pictures)["threshold"]

    @cached_property
    def _pictures(self) -> ImageSet:
        return ImageSet.open(self.metric.folder("references"))

    @cached_property
    def _index(self) -> torch.Tensor:
        return self._pictures.embeddings(self.metric.encoder)
