"""How even are the attributes that a prompt leaves open, and are those kept that it says? Of zero-shot labels.

The measures of OpenAI's addendum on 4o image generation (2025): of 20 images of a prompt the normalised Shannon
entropy of an attribute, how often outputs are heterogeneous, and whether what is said is obeyed. What is heterogeneous
is here a group of images that were made together.
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
    """Return the entropy of the shares of L >= 2 labels over log L: 0 for a single label, 1 for all alike."""
    given = np.asarray(shares, dtype=np.float64)
    if len(given) < 2 or (given < 0).any() or not given.sum() > 0:
        raise ValueError(f"expected shares of at least 2 labels, got {given.tolist()}; counts do, too")
    return float(entr(given / given.sum()).sum()) / math.log(len(given))


def confusion(truth: Sequence[int], found: Sequence[int], n_labels: int) -> np.ndarray:
    """Count images of each true label (row) that got each label (column): int64 [n_labels, n_labels]."""
    if len(truth) != len(found) or not len(truth):
        raise ValueError(f"expected a true label for each label found, got {len(truth)} and {len(found)}")
    matrix = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth), np.asarray(found)), 1)
    return matrix


def evenness_found(shares: Sequence[float], matrix: np.ndarray) -> float:
    """Return the evenness that a classifier with a confusion matrix [L, L] finds of true shares [L], of many images."""
    totals = matrix.sum(axis=1, keepdims=True)
    if not totals.all():
        raise ValueError(f"expected images of every label, got {totals.ravel().tolist()}; validate on some of each")
    return evenness(np.asarray(shares, dtype=np.float64) @ (matrix / totals))


def label_said(prompt: str, labels: Sequence[str]) -> int:
    """Return which label a prompt says: a whole phrase, so that "man" is not in "woman", nor "light" in "medium-light".

    Raises:
        ValueError: it says none or several of them.
    """
    said = [i for i, label in enumerate(labels) if re.search(rf"(?<![\w-]){re.escape(label)}(?![\w-])", prompt)]
    if len(said) != 1:
        raise ValueError(
            f"expected a prompt that says one of {', '.join(labels)}, got {prompt!r}; measure other prompts (`only`)"
        )
    return said[0]


class AttributeEvenness(AttributeEntropy):
    """Plain entropy of the labels of a category's images over its most, log L of L labels; mean over categories."""

    name = "attribute_evenness"
    version = 1
    unit = "share of the largest entropy, 0 to 1"
    bounds = (0, 1)
    description = "mean over categories of the entropy of the pooled zero-shot labels over that of labels all alike"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, miller_madow=False, **options)
        self.add_state("n_labels", torch.tensor(0), dist_reduce_fx="max")

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().update(images, labels)
        self.n_labels = self.n_labels.clamp(min=len(labels))

    def compute(self) -> torch.Tensor:
        """Return the evenness of all labels, float64 []."""
        counts = self._all("scores").long().bincount(minlength=int(self.n_labels))
        return torch.tensor(evenness(counts.tolist()), dtype=torch.float64)

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        most = {category: math.log(len(self.labels_of(category))) for category in {row.category for row in images.rows}}
        return [{**pool, "value": pool["value"] / most[pool["category"]]} for pool in super().per_group(images)]


class HeterogeneousShare(Attributes):
    """Share of groups whose images do not all get one label; `update` takes groups of images, [G, K, D]."""

    name = "heterogeneous_share"
    higher_is_better = True
    unit = "share of groups, 0 to 1"
    bounds = (0, 1)
    description = "share of groups whose images get more than one zero-shot label"
    minimum = 2

    def score(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = zero_shot_labels(images, labels)
        return (found != found[..., :1]).any(dim=-1)


class AsSaid(Attributes):
    """Share of a group's images that get the label which their prompt says; `update` takes its index [N], too."""

    name = "as_said"
    higher_is_better = True
    unit = "share of images, 0 to 1"
    bounds = (0, 1)
    description = "share of a group's images whose zero-shot label is the one that the prompt says"

    def score(self, images: torch.Tensor, labels: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        return zero_shot_labels(images, labels) == said

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        labels = self.labels_of(images.rows[positions[0]].category) or ()
        features = super().inputs(images, positions)  # which says where there are none
        return *features, torch.tensor([label_said(images.rows[position].prompt, labels) for position in positions])
