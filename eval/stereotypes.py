"""How evenly are attributes shown that a prompt leaves open, and are the attributes shown that it names?

The measures follow OpenAI's addendum on 4o image generation (2025): normalised entropy of an attribute, share of
heterogeneous outputs, and accuracy of the named attribute. All use zero-shot labels.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import entr

from eval.attributes import AttributeEntropy, Attributes, zero_shot_labels
from eval.imageset import ImageSet
from eval.intervals import GroupValue


def evenness(shares: Sequence[float]) -> float:
    """Return the entropy of the shares (or counts) of L >= 2 labels over log L: 0 for one label, 1 for equal shares."""
    values = np.asarray(shares, dtype=np.float64)
    if len(values) < 2 or (values < 0).any() or not values.sum() > 0:
        raise ValueError(f"expected shares of at least 2 labels, got {values.tolist()}; counts do, too")
    return float(entr(values / values.sum()).sum()) / math.log(len(values))


def confusion(truth: Sequence[int], predicted: Sequence[int], n_labels: int) -> np.ndarray:
    """Count images by true label (row) and predicted label (column): int64 [n_labels, n_labels]."""
    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(f"expected a true label for each label found, got {len(truth)} and {len(predicted)}")
    matrix = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth), np.asarray(predicted)), 1)
    return matrix


def evenness_found(shares: Sequence[float], matrix: np.ndarray) -> float:
    """Return the evenness that a classifier with confusion matrix [L, L] reports for true shares [L]."""
    totals = matrix.sum(axis=1, keepdims=True)
    if not totals.all():
        raise ValueError(f"expected images of every label, got {totals.ravel().tolist()}; validate on some of each")
    return evenness(np.asarray(shares, dtype=np.float64) @ (matrix / totals))


def label_in_prompt(prompt: str, labels: Sequence[str]) -> int:
    """Return the index of the label that a prompt names; raise ValueError if it names none or several.

    Only whole words count, so that "woman" does not name "man", nor "medium-light" name "light".
    """
    named = [i for i, label in enumerate(labels) if re.search(rf"(?<![\w-]){re.escape(label)}(?![\w-])", prompt)]
    if len(named) != 1:
        raise ValueError(
            f"expected a prompt that says one of {', '.join(labels)}, got {prompt!r}; measure other prompts (`only`)"
        )
    return named[0]


class AttributeEvenness(AttributeEntropy):
    """Mean over categories of the plug-in entropy of the pooled zero-shot labels over its maximum, log L."""

    name = "attribute_evenness"
    version = 1
    unit = "share of the largest entropy, 0 to 1"
    bounds = (0, 1)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, miller_madow=False, **options)
        self.add_state("n_labels", torch.tensor(0), dist_reduce_fx="max")

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().update(images, labels)
        self.n_labels = self.n_labels.clamp(min=len(labels))

    def compute(self) -> torch.Tensor:
        """Return the evenness of the labels of all images, float64 []."""
        counts = self._all("scores").long().bincount(minlength=int(self.n_labels))
        return torch.tensor(evenness(counts.tolist()), dtype=torch.float64)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        return [
            {**pool, "value": pool["value"] / math.log(len(self.labels_of(pool["category"]) or ()))}
            for pool in super().per_group(images)
        ]


class HeterogeneousShare(Attributes):
    """Share of groups whose images get more than one zero-shot label.

    `update` takes groups of images, [G, K, D], and the embeddings of the labels, [L, D].
    """

    name = "heterogeneous_share"
    higher_is_better = True
    unit = "share of groups, 0 to 1"
    bounds = (0, 1)
    minimum = 2

    def score(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predicted = zero_shot_labels(images, labels)
        return (predicted != predicted[..., :1]).any(dim=-1)


class AsSaid(Attributes):
    """Share of a group's images whose zero-shot label is the one that the prompt names.

    `update` takes images [N, D], the embeddings of the labels [L, D] and the index of the named label [N].
    """

    name = "as_said"
    higher_is_better = True
    unit = "share of images, 0 to 1"
    bounds = (0, 1)

    def score(self, images: torch.Tensor, labels: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        return zero_shot_labels(images, labels) == named

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        labels = self.labels_of(images.rows[positions[0]].category) or ()
        features = super().inputs(images, positions)  # which raises an error if the category has no labels
        return *features, torch.tensor(
            [label_in_prompt(images.rows[position].prompt, labels) for position in positions]
        )
