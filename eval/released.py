"""The Frechet distance as the paper's released scripts compute it: of squashed images, however few.

It is not what this suite reports: it is here so that published numbers can be matched, and so that the effect of each
choice can be shown beside the right number. Facts about the scripts: github.com/1jsingh/negtome,
`src/diversity_metric.py`. Their other choices are `ReleasedMeanSimilarity`, `ReleasedVendi` and
`CategoryPooledSimilarity` in `eval.metrics`; their ten parts of the Inception Score are `InceptionScore(splits=10)`
in `eval.fidelity`, though they do not shuffle before splitting.

| choice | here | what is right |
|---|---|---|
| images squashed before the FID | `Stretched` | aspect kept: the encoders |
| FID at any n | `ReleasedFrechetDistance` | refused where singular: `eval.fidelity` |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import center_crop, resize

from eval.encoders import Encoder
from eval.fidelity import AgainstReference, Gaussian, frechet_distance_of_gaussians
from eval.images import ManifestRow
from eval.weights import WeightsFacts

SIDE = 256


def stretched(image: torch.Tensor) -> torch.Tensor:
    """Squash an image as before the released FID: one side to 256, the other kept, then a centre crop of 256.

    The aspect ratio is lost: 1024 x 1024 becomes 256 x 1024, of which a quarter is cropped, squeezed four to
    one. Where a side is below 256 the crop fills up with black. Bilinear, antialiased, and cut to 8 bits without
    rounding, as there.

    Args:
        image: uint8 [3, H, W].

    Returns:
        uint8 [3, 256, 256].
    """
    height, width = image.shape[1:]
    size = [height, SIDE] if height < width else [SIDE, width]
    cropped = center_crop(resize(image.float() / 255, size, antialias=True), [SIDE, SIDE])
    return (cropped * 255).clamp(0, 255).to(torch.uint8)


class Stretched(Encoder):
    """An encoder that sees images squashed by `stretched`.

    Args:
        encoder: what embeds the squashed images.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.name = f"{encoder.name}, images squashed"
        self.normalised = encoder.normalised

    @property
    def id(self) -> str:
        """The encoder's, and what was done before."""
        return f"{self.encoder.id}-stretched{SIDE}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Encoder.embed_images`."""
        return self.encoder.embed_images([stretched(image) for image in images])

    def prepare(self) -> None:
        """See `Encoder.prepare`."""
        self.encoder.prepare()

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        return self.encoder.weights()


class ReleasedFrechetDistance(AgainstReference):
    """Frechet distance of squashed images, at any n; "FID" as released if the encoder is Inception.

    `minimum` is 2, since the script computes a covariance of whatever there is.

    Args:
        encoder: what embeds the images, once they are squashed.
        reference: folder of the real images, which are squashed as well. The script takes at most 2.5 of them an
            image, drawn at random: put those into the folder.
        name: for tables.
    """

    name = "released_frechet_distance"
    version = 1
    higher_is_better = False
    bounds = (0.0, None)
    unit = "squared distance of features, >= 0"
    description = "Frechet distance of images squashed to 256 pixels on one side and cropped, at any n"
    minimum = 2

    def __init__(self, encoder: Encoder, reference: str | Path, name: str | None = None) -> None:
        super().__init__(Stretched(encoder), reference, name)

    def summarise(self, reference: torch.Tensor) -> Gaussian:
        """See `AgainstReference.summarise`."""
        return Gaussian.of(reference)

    def compare(self, features: torch.Tensor, summary: Gaussian, rows: Sequence[ManifestRow]) -> float:
        """See `eval.fidelity.frechet_distance_of_gaussians`."""
        return frechet_distance_of_gaussians(Gaussian.of(features), summary)
