"""How different are the images of a group? Functions of embeddings [..., K, D] -> [...] in float64, and the metrics.

docs/metrics.md compares the definitions and states the bias of each.
"""

import math
from collections import Counter
from typing import Any

import torch

from eval.encoders import Scorer, unit_vectors
from eval.imageset import ImageSet
from eval.metric import Metric


def _gram(embeddings: torch.Tensor, minimum: int) -> torch.Tensor:
    """Compute the cosine similarities within each group: [..., K, D] -> float64 [..., K, K]."""
    if embeddings.ndim < 2 or embeddings.shape[-2] < minimum:
        raise ValueError(
            f"expected embeddings [..., K, D] with K >= {minimum} images a group, "
            f"got {list(embeddings.shape)}; generate more images a group"
        )
    x = unit_vectors(embeddings)
    return x @ x.mT


def mean_pairwise_similarity(embeddings: torch.Tensor) -> torch.Tensor:
    """Average the cosine over the pairs of images of each group [..., K, D], K >= 2: float64 [...] in [-1, 1]."""
    gram = _gram(embeddings, minimum=2)
    k = gram.shape[-1]
    i, j = torch.triu_indices(k, k, offset=1)
    return gram[..., i, j].mean(dim=-1)


def vendi_score(embeddings: torch.Tensor, q: float = 1.0) -> torch.Tensor:
    """Compute the effective number of different images in each group.

    The score is exp of the Renyi entropy of order q of the eigenvalues of S / n, where S holds the cosine similarities
    of n images. q = 1 is the Vendi Score, exp(-sum l log l) (Friedman and Dieng, TMLR 2023); a larger q gives frequent
    modes more weight (Pasarkar and Dieng, AISTATS 2024).

    Args:
        embeddings: [..., K, D], K >= 1. Scores of groups of different K are not comparable.
        q: order > 0, possibly infinite.

    Returns:
        float64 [...] in [1, K]; higher is more diverse.
    """
    if not q > 0:
        raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
    gram = _gram(embeddings, minimum=1)
    n = gram.shape[-1]
    eigenvalues = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    # Rounding turns an eigenvalue of 0 into about n machine epsilons, which a small q would amplify.
    eigenvalues = torch.where(eigenvalues > n * torch.finfo(torch.float64).eps, eigenvalues, 0)
    if math.isinf(q):
        return 1 / eigenvalues.amax(dim=-1)
    if q == 1:
        return torch.special.entr(eigenvalues).sum(dim=-1).exp()
    return eigenvalues.pow(q).sum(dim=-1).pow(1 / (1 - q))


class PairwiseSimilarity(Metric):
    """Mean cosine similarity over the pairs of images of a group.

    `update` takes groups, [..., K, D].
    """

    name = "pairwise_similarity"
    higher_is_better = False
    unit = "cosine, -1 to 1"
    bounds = (-1, 1)
    minimum = 2
    score = staticmethod(mean_pairwise_similarity)


class PairwiseDistance(Metric):
    """1 - mean cosine similarity over the pairs of images of a group."""

    name = "pairwise_distance"
    higher_is_better = True
    unit = "1 - cosine, 0 to 2"
    bounds = (0, 2)
    minimum = 2

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        return 1 - mean_pairwise_similarity(embeddings)


class CategoryPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of images of a category, as in the paper's script.

    Most pairs come from different groups, so report `PairwiseSimilarity` too. The "groups" of the document are the
    categories.
    """

    name = "category_pooled_similarity"
    pooled = "category"


class PromptPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of images of a prompt, from all seeds.

    Most likely the DreamSim number in the paper's table, whose script pools the images of a prompt from all seeds. With
    S groups of K images, a share of (K - 1) / (S K - 1) of the pairs was generated together.
    """

    name = "prompt_pooled_similarity"
    pooled = "prompt"


class VendiScore(Metric):
    """Effective number of different images in a group: exp of the entropy of the eigenvalues of the similarities / n.

    All groups must have the same size. `update` takes groups, [..., K, D].

    Args:
        encoder: embeds the images.
        q: order of the entropy, > 0; 1 is the Vendi Score.
    """

    name = "vendi_score"
    higher_is_better = True
    unit = "images, 1 to the group's size"
    bounds = (1, None)

    def __init__(self, encoder: Scorer | None = None, q: float = 1.0, **options: Any) -> None:
        super().__init__(encoder, **options)
        if not q > 0:
            raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
        self.q = float(q)

    def settings(self) -> dict[str, Any]:
        return {"q": "inf" if math.isinf(self.q) else self.q}

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        return vendi_score(embeddings, self.q)

    def require(self, images: ImageSet) -> None:
        super().require(images)
        sizes = Counter(map(len, images.groups.values()))
        if len(sizes) > 1:
            listing = ", ".join(f"{count} groups of {size}" for size, count in sorted(sizes.items()))
            raise ValueError(
                f"expected groups of one size, since a Vendi Score grows with it, got {listing}; "
                "measure folders of one size each"
            )
