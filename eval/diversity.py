"""How different are the images of one group? Pure functions on embeddings [G, K, D] -> [G].

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

import torch
import torch.nn.functional as F


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
    """Average the cosine similarity over the unordered pairs of each group.

    Args:
        embeddings: [G, K, D], K >= 2.

    Returns:
        float64 [G] in [-1, 1]; lower is more diverse.
    """
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
