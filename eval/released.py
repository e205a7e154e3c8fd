"""The numbers as the paper's released scripts compute them.

They are not what this suite reports: they are here so that published numbers can be matched, and so that the effect of
each choice can be shown beside the right number. Facts about the scripts: github.com/1jsingh/negtome,
`src/diversity_metric.py`. Their pooled similarity is `eval.diversity.CategoryPooledSimilarity`; their ten parts of the
Inception Score are `eval.fidelity.InceptionScore(splits=10)`, though they do not shuffle before splitting.

| choice | here | what is right |
|---|---|---|
| the diagonal counts | `ReleasedMeanSimilarity` | pairs of different images: `eval.diversity` |
| eigenvalues of K, not K / n | `ReleasedVendi` | `eval.diversity.vendi_score` |
| images squashed before the FID | `Stretched` | aspect kept: the encoders |
| FID at any n | `ReleasedFrechetDistance` | refused where singular: `eval.fidelity` |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import center_crop, resize

from eval.diversity import EmbeddingMetric, VendiScore, mean_pairwise_similarity, vendi_score
from eval.encoders import Encoder
from eval.fidelity import FidelityMetric, Gaussian, frechet_distance_of_gaussians
from eval.images import ManifestRow
from eval.weights import WeightsFacts

CROP = 256


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
    size = [height, CROP] if height < width else [CROP, width]
    cropped = center_crop(resize(image.float() / 255, size, antialias=True), [CROP, CROP])
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
        return f"{self.encoder.id}-stretched{CROP}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.encoder.embed_images([stretched(image) for image in images])

    def prepare(self) -> None:
        self.encoder.prepare()

    def weights(self) -> WeightsFacts:
        return self.encoder.weights()


class ReleasedFrechetDistance(FidelityMetric):
    """Frechet distance of squashed images, at any n; "FID" as released if the encoder is Inception.

    `minimum` is 2, since the script computes a covariance of whatever there is.

    Args:
        encoder: what embeds the images, once they are squashed.
        reference: folder of the real images, which are squashed as well. The script takes at most 2.5 of them an
            image, drawn at random: put those into the folder.
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
        return Gaussian.of(reference)

    def compare(self, features: torch.Tensor, summary: Gaussian, rows: Sequence[ManifestRow]) -> float:
        return frechet_distance_of_gaussians(Gaussian.of(features), summary)


class ReleasedMeanSimilarity(EmbeddingMetric):
    """The mean similarity as the released script has it: of all images of a prompt, each one's 1 to itself included.

    Only to match published numbers: the script's matrix is that of a prompt's images of all seeds, most pairs of which
    were not made together. With the mean similarity s of the K images it is (1 + (K - 1) s) / K, and so depends on K.
    """

    name = "released_mean_similarity"
    version = 2
    pooled = "prompt_id"
    higher_is_better = False
    unit = "cosine, -1 to 1"
    description = (
        "mean over the whole similarity matrix of a prompt's images of all seeds, its diagonal of ones included, as "
        "the released script"
    )

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Average the whole matrix: [G, K, D] -> [G]."""
        k = embeddings.shape[1]
        return torch.ones(len(embeddings)) if k == 1 else (1 + (k - 1) * mean_pairwise_similarity(embeddings)) / k


class ReleasedVendi(VendiScore):
    """The "Vendi Score" as the released script has it: eigenvalues of K itself instead of K / n.

    Only to match published numbers: the script's K is that of a prompt's n images of all seeds. With eigenvalues l of
    K / n (summing to 1) and the Vendi Score V, it is
    (V / n)^n: 1 where all n images differ wholly, n^-n where all are the same, and no number of images at all.
    """

    name = "released_vendi"
    version = 2
    pooled = "prompt_id"
    higher_is_better = True
    unit = "no unit, 0 to 1"
    bounds = (0, 1)
    description = (
        "exp of -sum m log m over the eigenvalues m of the K of a prompt's images of all seeds, not K / n, as the "
        "released script"
    )

    def __init__(self, encoder: Encoder, name: str | None = None) -> None:
        super().__init__(encoder, name=name)

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score groups: [G, K, D] -> [G]; -sum (n l) log(n l) is n (log V - log n)."""
        n = embeddings.shape[1]
        return (vendi_score(embeddings) / n) ** n
