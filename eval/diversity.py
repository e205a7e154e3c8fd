"""How different are the images of one group? Functions of embeddings [..., K, D] -> [...], and the metrics.

Which of the possible definitions each is, and its bias: docs/metrics.md. Computed in float64, since the differences
between methods can be small.
"""

import math
from collections import Counter
from typing import Any

import torch

from eval.encoders import Scorer, unit_vectors
from eval.imageset import ImageSet
from eval.metric import Metric


def _gram(embeddings: torch.Tensor, minimum: int) -> torch.Tensor:
    """Cosine similarities within each group: [..., K, D] -> float64 [..., K, K]."""
    if embeddings.ndim < 2 or embeddings.shape[-2] < minimum:
        raise ValueError(
            f"expected embeddings [..., K, D] with K >= {minimum} images a group, "
            f"got {list(embeddings.shape)}; generate more images a group"
        )
    x = unit_vectors(embeddings)
    return x @ x.mT


def mean_pairwise_similarity(embeddings: torch.Tensor) -> torch.Tensor:
    """Average the cosine over the pairs of different images of groups [..., K, D], K >= 2: float64 [...] in [-1, 1]."""
    gram = _gram(embeddings, minimum=2)
    i, j = torch.triu_indices(*gram.shape[-2:], offset=1)
    return gram[..., i, j].mean(dim=-1)


def vendi_score(embeddings: torch.Tensor, q: float = 1.0) -> torch.Tensor:
    """Return the effective number of different images in each group.

    exp of the Renyi entropy of order q of the eigenvalues of K / n, K the cosine similarities. q = 1 is the
    Vendi Score, exp(-sum l log l) (Friedman and Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine
    Learning", TMLR 2023); larger q weighs frequent modes more (Pasarkar and Dieng, AISTATS 2024).

    Args:
        embeddings: [..., K, D], K >= 1. Scores of groups of different K cannot be compared.
        q: order, > 0; infinity allowed.

    Returns:
        float64 [...] in [1, K]; higher is more diverse.
    """
    if not q > 0:
        raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
    gram = _gram(embeddings, minimum=1)
    n = gram.shape[-1]
    eigenvalues = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    # Rounding leaves about n machine epsilons where the eigenvalue is 0, which a small q would blow up.
    eigenvalues = torch.where(eigenvalues > n * torch.finfo(torch.float64).eps, eigenvalues, 0)
    if math.isinf(q):
        return 1 / eigenvalues.amax(dim=-1)
    if q == 1:
        return torch.special.entr(eigenvalues).sum(dim=-1).exp()
    return eigenvalues.pow(q).sum(dim=-1).pow(1 / (1 - q))


class PairwiseSimilarity(Metric):
    """Mean cosine similarity over the pairs of images of a group; `update` takes groups, [..., K, D]."""

    name = "pairwise_similarity"
    higher_is_better = False
    unit = "cosine, -1 to 1"
    bounds = (-1, 1)
    description = "mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2
    score = staticmethod(mean_pairwise_similarity)


class PairwiseDistance(Metric):
    """1 - `PairwiseSimilarity`."""

    name = "pairwise_distance"
    higher_is_better = True
    unit = "1 - cosine, 0 to 2"
    bounds = (0, 2)
    description = "1 - mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        return 1 - mean_pairwise_similarity(embeddings)


class CategoryPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of all images of a category: what the paper's script reports.

    Most of these pairs come from different groups: report `PairwiseSimilarity` beside it. The document's "groups" are
    whole categories, since an image occurs in pairs with every other one of its category.
    """

    name = "category_pooled_similarity"
    description = (
        "mean cosine similarity over the pairs of different images of a category, whatever their group; mean over "
        "categories, which are the units"
    )
    pooled = "category"


class PromptPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of all images of a prompt, of whatever seeds.

    Most likely the DreamSim of the paper's printed table, whose script gathers the images of a prompt from all seeds.
    Of these pairs, (K - 1) / (S K - 1) were made together where there are S groups of K images.
    """

    name = "prompt_pooled_similarity"
    description = (
        "mean cosine similarity over the pairs of different images of a prompt, whatever their group; mean over prompts"
    )
    pooled = "prompt"


class VendiScore(Metric):
    """Effective number of different images in a group; only for groups of one size. `update` takes [..., K, D].

    Args:
        q: order of the entropy, > 0; 1 is the Vendi Score.
    """

    name = "vendi_score"
    higher_is_better = True
    unit = "images, 1 to the group's size"
    bounds = (1, None)
    description = "effective number of different images of a group: exp of the entropy of the eigenvalues of K / n"

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
