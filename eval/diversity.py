"""How different are the images of one group? Pure functions on embeddings [G, K, D] -> [G], and the metrics.

G groups of K images, D dimensions. Which of the possible definitions:

* similarity is the cosine, averaged over the K (K - 1) / 2 unordered pairs of DIFFERENT images. The diagonal
  of ones is left out; with it the figure would depend on K.
* distance is 1 - similarity, so the two never disagree. Papers print one or the other: label the column.
* the Vendi Score takes the entropy of the eigenvalues of K / n (Friedman and Dieng, "The Vendi Score: A
  Diversity Evaluation Metric for Machine Learning", TMLR 2023, Definition 3.1). It lies in [1, n] and grows
  with n: compare equal n only.

Computed in float64, since the differences between methods can be small.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from typing import Any, Literal

import torch
import torch.nn.functional as F

from eval.aggregates import GroupValue
from eval.encoders import Encoder
from eval.imageset import ImageSet
from eval.metric import Metric


def _gram(embeddings: torch.Tensor, minimum: int) -> torch.Tensor:
    """Cosine similarities within each group: [G, K, D] -> float64 [G, K, K]."""
    if embeddings.ndim != 3 or embeddings.shape[1] < minimum:
        raise ValueError(
            f"expected embeddings [G, K, D] with K >= {minimum} images a group, "
            f"got {list(embeddings.shape)}; generate more images a group"
        )
    x = embeddings.double()
    norms = x.norm(dim=-1)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("expected finite embeddings that are not zero, got others; cosine is undefined for them")
    x = F.normalize(x, dim=-1)
    return x @ x.transpose(1, 2)


def mean_pairwise_similarity(embeddings: torch.Tensor) -> torch.Tensor:
    """Average the cosine over the pairs of groups [G, K, D], K >= 2: float64 [G] in [-1, 1]; lower is more diverse."""
    gram = _gram(embeddings, minimum=2)
    k = gram.shape[1]
    i, j = torch.triu_indices(k, k, offset=1)
    return gram[:, i, j].mean(dim=-1)


def mean_pairwise_distance(embeddings: torch.Tensor) -> torch.Tensor:
    """Return 1 - `mean_pairwise_similarity`: float64 [G] in [0, 2]; higher is more diverse."""
    return 1 - mean_pairwise_similarity(embeddings)


def vendi_score(embeddings: torch.Tensor, q: float = 1.0) -> torch.Tensor:
    """Return the effective number of different images in each group.

    exp of the Renyi entropy of order q of the eigenvalues of K / n, K the cosine similarities. q = 1 is the
    Vendi Score, exp(-sum l log l); larger q weighs frequent modes more (Pasarkar and Dieng, AISTATS 2024).

    Args:
        embeddings: [G, K, D], K >= 1. Scores of groups of different K cannot be compared.
        q: order, > 0; infinity allowed.

    Returns:
        float64 [G] in [1, K]; higher is more diverse.
    """
    if not q > 0:
        raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
    gram = _gram(embeddings, minimum=1)
    n = gram.shape[1]
    eigenvalues = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    # Rounding leaves about n machine epsilons where the eigenvalue is 0, which a small q would blow up.
    eigenvalues = torch.where(eigenvalues > n * torch.finfo(torch.float64).eps, eigenvalues, 0)
    if math.isinf(q):
        return 1 / eigenvalues.amax(dim=-1)
    if q == 1:
        return torch.special.entr(eigenvalues).sum(dim=-1).exp()
    return eigenvalues.pow(q).sum(dim=-1).pow(1 / (1 - q))


class EmbeddingMetric(Metric):
    """A metric that is a pure function of the embeddings [G, K, D] of groups of K images.

    Attributes:
        minimum: images that each group must have.
        pooled: what images must share to be measured together; None for those of a group.
    """

    minimum = 1
    pooled: Literal["category"] | None = None

    @abstractmethod
    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[G, K, D] -> [G]."""

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        pools = images.pools(self.pooled)
        small = [pool for pool, members in pools.items() if len(members) < self.minimum]
        if small:
            raise ValueError(
                f"expected at least {self.minimum} images in every {self.pooled or 'group'} for {self.name}, got fewer "
                f"in {len(small)}: {', '.join(small[:10])}; generate more images"
            )
        embeddings = images.embeddings(self.encoder)
        return [
            {
                "group": pool,
                "category": images.rows[members[0]].category,
                "n_images": len(members),
                "value": self.measure_groups(embeddings[members][None]).item(),
            }
            for pool, members in pools.items()
        ]


class PairwiseSimilarity(EmbeddingMetric):
    """Mean cosine similarity over the pairs of images of a group."""

    name = "pairwise_similarity"
    version = 1
    higher_is_better = False
    unit = "cosine, -1 to 1"
    bounds = (-1, 1)
    description = "mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2
    measure_groups = staticmethod(mean_pairwise_similarity)


class PairwiseDistance(EmbeddingMetric):
    """Mean cosine distance over the pairs of images of a group."""

    name = "pairwise_distance"
    version = 1
    higher_is_better = True
    unit = "1 - cosine, 0 to 2"
    bounds = (0, 2)
    description = "1 - mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2
    measure_groups = staticmethod(mean_pairwise_distance)


class VendiScore(EmbeddingMetric):
    """Effective number of different images in a group; only for groups of one size.

    Args:
        q: order of the entropy, > 0; 1 is the Vendi Score.
    """

    name = "vendi_score"
    version = 1
    higher_is_better = True
    unit = "images, 1 to the group's size"
    bounds = (1, None)
    description = "effective number of different images of a group: exp of the entropy of the eigenvalues of K / n"

    def __init__(self, encoder: Encoder, q: float = 1.0, name: str | None = None) -> None:
        super().__init__(encoder, name)
        if not q > 0:
            raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
        self.q = float(q)

    def settings(self) -> dict[str, Any]:
        return {"q": "inf" if self.q == float("inf") else self.q}

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        sizes = Counter(map(len, images.groups.values()))
        if len(sizes) > 1:
            listing = ", ".join(f"{count} groups of {size}" for size, count in sorted(sizes.items()))
            raise ValueError(
                f"expected groups of one size, since a Vendi Score grows with it, got {listing}; "
                "measure folders of one size each"
            )
        return super().per_group(images)

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        return vendi_score(embeddings, self.q)


class CategoryPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of all images of a category: what the paper's script reports.

    Most of these pairs come from different groups, and say little about images that were made together: report
    `PairwiseSimilarity` beside it. An image occurs in pairs with every other one of its category, so neither pairs nor
    groups are independent: the document's "groups" are whole categories, and intervals and tests say how the number
    would vary with others.
    """

    name = "category_pooled_similarity"
    description = (
        "mean cosine similarity over the pairs of different images of a category, whatever their group; mean over "
        "categories, which are the units"
    )
    pooled = "category"
