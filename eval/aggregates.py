"""How the values of groups become one number, by a name that a result file can carry.

An aggregate is a function of how often each group counts: once each gives the reported value, and a bootstrap
passes the numbers of draws instead. Both need only the groups' values, no images and no encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from eval.attributes import MINIMUM_IMAGES, entropy


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


Weighted = Callable[[np.ndarray], np.ndarray]


class Aggregate(ABC):
    """From group values to one number.

    Attributes:
        name: as written into result files; a key of `AGGREGATES`.
        description: for tables' notes.
    """

    name: str
    description: str

    @abstractmethod
    def weighted(self, groups: Sequence[GroupValue]) -> Weighted:
        """Return a function from weights [R, G] (how often each group counts) to R numbers, float64 [R]."""

    def strata(self, groups: Sequence[GroupValue]) -> np.ndarray:
        """Return each group's stratum, within which a bootstrap may exchange it, int [G]."""
        return np.zeros(len(groups), dtype=int)

    def value(self, groups: Sequence[GroupValue]) -> float:
        """Return the number, every group counted once, whatever their order."""
        ordered = sorted(groups, key=lambda group: group["group"])
        return float(self.weighted(ordered)(np.ones((1, len(ordered))))[0])


class Mean(Aggregate):
    """The mean over groups, each with the same weight."""

    name = "mean"
    description = "mean over groups"

    def weighted(self, groups: Sequence[GroupValue]) -> Weighted:
        """See `Aggregate.weighted`."""
        values = np.array([_entry(group, "value", self.name) for group in groups], dtype=np.float64)
        _require_finite(groups, values)
        return lambda weights: weights @ values / weights.sum(axis=1)


class CategoryEntropy(Aggregate):
    """The mean over categories of the entropy (nats, Miller-Madow) of the category's pooled label counts."""

    name = "category_entropy"
    description = "mean over categories of the Miller-Madow entropy (nats) of the category's pooled label counts"

    def weighted(self, groups: Sequence[GroupValue]) -> Weighted:
        """See `Aggregate.weighted`.

        Raises:
            ValueError: a category has fewer images than an entropy can be estimated from.
        """
        counts = [_entry(group, "counts", self.name) for group in groups]
        tables = []
        for category in sorted({group["category"] for group in groups}):
            members = [index for index, group in enumerate(groups) if group["category"] == category]
            labels = sorted(set().union(*(counts[index] for index in members)))
            table = np.array([[counts[index].get(label, 0) for label in labels] for index in members], dtype=float)
            try:
                entropy(table.sum(axis=0), minimum=MINIMUM_IMAGES)
            except ValueError as error:
                raise ValueError(f"in category {category!r}: {error}") from error
            tables.append((members, table))
        # A resample keeps about the category's n, which was checked above.
        return lambda weights: np.mean(
            [entropy(weights[:, members] @ table, minimum=1) for members, table in tables], axis=0
        )

    def strata(self, groups: Sequence[GroupValue]) -> np.ndarray:
        """Groups stand for their category: see `Aggregate.strata`."""
        return np.unique([group["category"] for group in groups], return_inverse=True)[1]


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


def _require_finite(groups: Sequence[GroupValue], values: np.ndarray) -> None:
    if not len(values):
        raise ValueError("expected at least one group, got none; measure a folder with images")
    if not np.isfinite(values).all():
        bad = [group["group"] for group, value in zip(groups, values, strict=True) if not np.isfinite(value)]
        raise ValueError(f"expected finite values, got others in {bad[:10]}; look at their images")
