"""How the values of groups become one number, by a name that a result file can carry.

Every aggregate is a mean: of the groups' values, or of the categories' entropies. What it is a mean of is what can be
resampled, exchanged and paired. All of it needs only what is in a result file, no images and no encoder.

Entropies are in nats. The plug-in estimate is biased down by about (m - 1) / 2n (m labels seen, n images); Miller and
Madow's correction adds just that, so it may lie a little above log(number of labels).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

# Fewer images than this have no entropy, however few the labels.
MINIMUM_IMAGES = 8


def entropy(counts: Sequence[int], miller_madow: bool = True) -> float:
    """Estimate a Shannon entropy from label counts, natural logarithm.

    Args:
        counts: [L] how often each label was seen, >= 0.
        miller_madow: add (m - 1) / 2n, m the number of labels seen.

    Returns:
        In nats, 0 where all images have one label.

    Raises:
        ValueError: n, the sum of counts, below `MINIMUM_IMAGES`.
    """
    seen = np.asarray(counts, dtype=np.float64)
    n = seen.sum()
    if n < MINIMUM_IMAGES:
        raise ValueError(
            f"expected at least {MINIMUM_IMAGES} images for an entropy, got {int(n)}; "
            "its bias would exceed the differences looked for: generate more images or pool more groups"
        )
    p = seen / n
    plug_in = -(p * np.log(np.where(p > 0, p, 1))).sum()
    return float(plug_in + ((seen > 0).sum() - 1) / (2 * n) if miller_madow else plug_in)


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


def _group_values(groups: Sequence[GroupValue]) -> list[GroupValue]:
    """Return the groups themselves: each has the same weight."""
    bad = [group["group"] for group in groups if not np.isfinite(group["value"])]
    if bad:
        raise ValueError(f"expected finite values, got others in {bad[:10]}; look at their images")
    return list(groups)


def _category_entropies(groups: Sequence[GroupValue]) -> list[GroupValue]:
    """Return for each category the entropy (nats, Miller-Madow) of its pooled label counts.

    Categories are what is resampled: labels within one say nothing of others, and an entropy of resampled groups is
    lower than that of the groups themselves, since repeated groups show fewer labels.
    """
    members: dict[str, list[GroupValue]] = {}
    for group in groups:
        members.setdefault(group["category"], []).append(group)
    values: list[GroupValue] = []
    for category, own in sorted(members.items()):
        counts: Counter[str] = Counter()
        for group in own:
            counts.update(group["counts"])
        try:
            value = entropy([counts[label] for label in sorted(counts)])
        except ValueError as error:
            raise ValueError(f"in category {category!r}: {error}") from error
        # named as groups are, so that a category is a cluster of its own however clusters are formed
        n_images = sum(group["n_images"] for group in own)
        values.append({"group": f"{category}/all", "category": category, "n_images": n_images, "value": value})
    return values


#: From groups, sorted by id, to what the number is the mean of, by the name that is written into result files.
AGGREGATES: Mapping[str, Callable[[Sequence[GroupValue]], list[GroupValue]]] = {
    "mean": _group_values,
    "category_entropy": _category_entropies,
}


def values_of(groups: Sequence[GroupValue], aggregate: str = "mean") -> list[GroupValue]:
    """Return what an aggregate is the mean of, each with a finite `value`, in the order of their ids.

    Raises:
        ValueError: no groups, a value that is not finite, or too few images in a category for its entropy.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"expected an aggregate among {sorted(AGGREGATES)}, got {aggregate!r}; measure again")
    if not groups:
        raise ValueError("expected at least one group, got none; measure a folder with images")
    return AGGREGATES[aggregate](sorted(groups, key=lambda group: group["group"]))


def mean_of(values: Sequence[GroupValue]) -> float:
    """Return the mean of `values_of` groups, every value counted once."""
    return float(np.mean([entry["value"] for entry in values]))
