"""How the values of groups become one number, by a name that a result file can carry.

Every aggregate is a mean: of the groups' values, or of the categories' entropies. What it is a mean of is what can be
resampled, exchanged and paired. All of it needs only what is in a result file, no images and no encoder.

Entropies are in nats. The plug-in estimate is biased down by about (m - 1) / 2n (m labels seen, n images); Miller and
Madow's correction adds just that, so it may lie a little above log(number of labels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

# Fewer images than this have no entropy, however few the labels.
MINIMUM_IMAGES = 8


def entropy(counts: np.ndarray, miller_madow: bool = True, minimum: int = MINIMUM_IMAGES) -> np.ndarray:
    """Estimate Shannon entropies from label counts, natural logarithm.

    Args:
        counts: [..., L] how often each label was seen, >= 0.
        miller_madow: add (m - 1) / 2n, m the number of labels seen.
        minimum: smallest n = sum of counts that is accepted.

    Returns:
        float64 [...], in nats, 0 where all images have one label.

    Raises:
        ValueError: n below `minimum`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    n = counts.sum(axis=-1, keepdims=True)
    if (n < max(minimum, 1)).any():
        raise ValueError(
            f"expected at least {max(minimum, 1)} images for an entropy, got {int(n.min())}; "
            "its bias would exceed the differences looked for: generate more images or pool more groups"
        )
    p = counts / n
    plug_in = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    if not miller_madow:
        return plug_in
    return plug_in + ((counts > 0).sum(axis=-1) - 1) / (2 * n[..., 0])


class GroupValue(TypedDict):
    """What a metric found in one group: a `value`, or `counts` of labels.

    `group` is `prompt_id/group_seed`; `category` what the prompt asks for; `n_images` how many images were
    used.
    """

    group: str
    category: str
    n_images: int
    value: NotRequired[float]
    counts: NotRequired[dict[str, int]]


class Aggregate(ABC):
    """From groups to one number.

    Attributes:
        name: as written into result files; a key of `AGGREGATES`.
        description: for tables' notes.
    """

    name: str
    description: str

    @abstractmethod
    def values(self, groups: Sequence[GroupValue]) -> list[GroupValue]:
        """Return what the number is the mean of, each with a finite `value`, in the order of their ids."""

    def value(self, groups: Sequence[GroupValue]) -> float:
        """Return the number, every value counted once."""
        return float(np.mean([entry["value"] for entry in self.values(groups)]))


class Mean(Aggregate):
    """The mean over groups, each with the same weight."""

    name = "mean"
    description = "mean over groups"

    def values(self, groups: Sequence[GroupValue]) -> list[GroupValue]:
        bad = [group["group"] for group in groups if not np.isfinite(_entry(group, "value", self.name))]
        if bad:
            raise ValueError(f"expected finite values, got others in {bad[:10]}; look at their images")
        return _sorted(groups)


class CategoryEntropy(Aggregate):
    """The mean over categories of the entropy (nats, Miller-Madow) of the category's pooled label counts.

    Categories are what is resampled: labels within one say nothing of others, and an entropy of resampled groups is
    lower than that of the groups themselves, since repeated groups show fewer labels.
    """

    name = "category_entropy"
    description = "mean over categories of the Miller-Madow entropy (nats) of the category's pooled label counts"

    def values(self, groups: Sequence[GroupValue]) -> list[GroupValue]:
        """Return one a category; see `Aggregate.values`.

        Raises:
            ValueError: a category has fewer images than an entropy can be estimated from.
        """
        pooled: dict[str, Counter[str]] = {}
        images: Counter[str] = Counter()
        for group in _sorted(groups):
            pooled.setdefault(group["category"], Counter()).update(_entry(group, "counts", self.name))
            images[group["category"]] += group["n_images"]
        return [
            # named as groups are, so that a category is a cluster of its own however clusters are formed
            {
                "group": f"{category}/all",
                "category": category,
                "n_images": images[category],
                "value": _entropy(category, pooled[category]),
            }
            for category in sorted(pooled)
        ]


AGGREGATES: Mapping[str, Aggregate] = {aggregate.name: aggregate for aggregate in (Mean(), CategoryEntropy())}


def aggregate_named(name: str | Aggregate) -> Aggregate:
    """Look an aggregate up by its name; an aggregate is returned as it is."""
    if isinstance(name, Aggregate):
        return name
    if name not in AGGREGATES:
        raise ValueError(f"expected an aggregate among {sorted(AGGREGATES)}, got {name!r}; measure again")
    return AGGREGATES[name]


def _entry(group: GroupValue, key: str, name: str) -> float | dict[str, int]:
    if key not in group:
        raise ValueError(f"expected {key!r} in every group for the aggregate {name!r}, got {group}; measure again")
    return group[key]


def _entropy(category: str, counts: Mapping[str, int]) -> float:
    try:
        return float(entropy(np.array([counts[label] for label in sorted(counts)])))
    except ValueError as error:
        raise ValueError(f"in category {category!r}: {error}") from error


def _sorted(groups: Sequence[GroupValue]) -> list[GroupValue]:
    if not groups:
        raise ValueError("expected at least one group, got none; measure a folder with images")
    return sorted(groups, key=lambda group: group["group"])
