"""How sure, and how varied, are a classifier's predictions? The Inception Score, which knows no real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eval.encoders import Encoder, Scorer
from eval.metric import SetMetric

# Images a split must have: a mean prediction of fewer says nothing about variety.
IMAGES_A_SPLIT = 10


def inception_score(logits: torch.Tensor, splits: int = 1, seed: int = 2020) -> float:
    """Return exp of the mean KL divergence of an image's predicted classes from the mean prediction.

    Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016). Biased down at small N, and by more
    splits. Of one narrow category it is near 1, whatever the quality.

    Args:
        logits: [N, C] of a classifier, N >= 10 a split.
        splits: the score is averaged over so many parts; papers use 10. 1 does not depend on the order.
        seed: of the shuffle before splitting, as in torch-fidelity: images in the order of their categories would
            leave few categories to a split.

    Returns:
        In [1, min(N / splits, C)]; higher is better.
    """
    if logits.ndim != 2 or splits < 1:
        raise ValueError(
            f"expected logits [N, C] and at least one split, got {list(logits.shape)} and {splits}; 1 or 10 is usual"
        )
    n = len(logits)
    if n < IMAGES_A_SPLIT * splits:
        raise ValueError(
            f"expected at least {IMAGES_A_SPLIT * splits} images for {splits} splits, got {n}: the mean prediction "
            f"needs {IMAGES_A_SPLIT} a split; give more images, or leave this number out"
        )
    order = np.random.RandomState(seed).permutation(n) if splits > 1 else np.arange(n)
    log_p = logits.double()[torch.from_numpy(order)].log_softmax(dim=1)
    scores = []
    for index in range(splits):
        part = log_p[index * n // splits : (index + 1) * n // splits]
        marginal = part.logsumexp(dim=0) - np.log(len(part))
        # a probability of 0 contributes nothing, where 0 times infinity would be NaN
        divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


class InceptionScore(SetMetric):
    """The Inception Score if the encoder is Inception; `minimum` is that of `inception_score`.

    `update` takes images, or logits [N, C] where there is no encoder.

    Args:
        encoder: one with a classifier head, `logits_from_features`.
        splits: the score is averaged over so many parts.
    """

    name = "inception_score"
    higher_is_better = True
    bounds = (1.0, None)
    unit = "classes, 1 to the classifier's number of them"
    description = "exp of the mean KL divergence of the images' predicted classes from their mean"

    def __init__(self, encoder: Scorer | None = None, splits: int = 1, **options: Any) -> None:
        super().__init__(encoder, **options)
        if getattr(type(encoder), "logits_from_features", None) is Encoder.logits_from_features:
            raise TypeError(
                f"expected an encoder with a classifier head for {self.name}, got {encoder.name}; "
                "use Inception or EfficientNet-lite0"
            )
        if splits < 1:
            raise ValueError(f"expected at least one split, got {splits}; 1 or 10 is usual")
        self.splits = splits
        self.minimum = IMAGES_A_SPLIT * splits

    def settings(self) -> dict[str, Any]:
        return {"splits": self.splits}

    def score(self, features: torch.Tensor) -> float:
        classified = self.encoder.logits_from_features(features) if isinstance(self.encoder, Encoder) else features
        return inception_score(classified, self.splits)
