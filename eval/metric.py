"""What a metric is: one interface for whatever is measured of a folder of images.

A metric gives every group a value, or label counts, and names the aggregate that makes one number of them
(see `eval.aggregates`). Its document (see `eval.measure`) holds the groups' values, so that intervals, paired
differences and tables need neither images nor encoder. Each question has a file of its own, with the arithmetic
as functions first and then as metrics.

A number of a whole set of images, such as a Frechet distance, has no values of groups. A `SetMetric` measures
it on all images and again on seeded halves of the categories; the document holds those numbers instead.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from eval.aggregates import GroupValue, mean_of, values_of
from eval.encoders import Scorer
from eval.files import canonical_json
from eval.imageset import ImageSet
from eval.intervals import Cluster, clusters_of


class Metric(ABC):
    """Something measured of every group of images.

    Attributes:
        name: of the metric, as in tables.
        version: raised whenever the same images could give another number.
        higher_is_better: None where neither direction is.
        unit: of the number, with its range.
        description: what is computed, in a sentence.
        bounds: the least and the largest number there can be, None where there is no end to it: an unbiased estimate
            of a distance, say, may be negative. Intervals stay within, and only of a number that cannot be negative is
            a share of it a margin.
        aggregate: what makes one number of the groups'; a key of `eval.aggregates.AGGREGATES`.
        encoder: what embeds the images, or compares or scores them; `Pixels()` where a metric takes them as they are.
        only: patterns such as "direct-*"; where given, only groups whose prompt_id fits one of them are measured.
    """

    name: str
    version: int
    higher_is_better: bool | None
    unit: str
    description: str
    bounds: tuple[float | None, float | None] = (None, None)
    aggregate: str = "mean"
    encoder: Any = None
    only: tuple[str, ...] | None = None

    def __init__(self, encoder: Scorer | None = None, name: str | None = None) -> None:
        if encoder is not None:
            self.encoder = encoder
        if name is not None:
            self.name = name
        if self.encoder is None:
            raise TypeError(
                f"expected an encoder for {self.name}, got None; give one, or define `encoder` in {type(self).__name__}"
            )

    def settings(self) -> dict[str, Any]:
        """Return whatever else changes the number, as JSON values."""
        return {}

    def design(self) -> dict[str, Any]:
        """Return how parts of the images are drawn to tell how sure the number is, as JSON values."""
        return {}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Return what a reader should know about this measurement, as JSON values."""
        return {}

    def prepare(self) -> None:
        """Load the encoder now, so that missing weights are found before any work is done."""
        self.encoder.prepare()

    @abstractmethod
    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """Measure every group, in canonical order."""

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Return the document's numbers: `value`, `n_groups`, `n_images` and `groups`."""
        groups = self.per_group(images)
        return {
            "value": mean_of(values_of(groups, self.aggregate)),
            "n_groups": len(groups),
            "n_images": sum(group["n_images"] for group in groups),
            "groups": groups,
        }


class ImageMetric(Metric):
    """A metric that scores every image by itself; a group has the mean of its images."""

    @abstractmethod
    def scores(self, images: ImageSet) -> torch.Tensor:
        """Return a score for every image, [N], in the order of `images.rows`."""

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        scores = self.scores(images).double()
        return [
            images.group_value(group, value=scores[members].mean().item()) for group, members in images.groups.items()
        ]


class SetMetric(Metric):
    """A number of a whole set of images that is not a mean over groups: a distance between distributions, say.

    Repeated images are no new images, and such numbers are biased by their count, so that nothing is resampled: the
    number is measured on `SUBSETS` halves, drawn without replacement (see `eval.intervals`). What is drawn are whole
    categories, since groups of one are not independent; which, depends on the groups' ids and categories alone, so that
    two methods get the same halves and their differences are paired.

    Attributes:
        cluster: what is drawn as one: "category", "prompt", or None for single groups.
        minimum: images below which the number is refused, for the set itself; where a half is smaller, or there
            are fewer than `FEWEST` clusters to draw from, there are no subsets, and the interval is not estimable.
            A subclass says why it is what it is.
    """

    SUBSETS: ClassVar[int] = 20
    SHARE: ClassVar[float] = 0.5
    FEWEST: ClassVar[int] = 6
    cluster: Cluster | None = "category"
    minimum: int = 2
    aggregate = "subsets"

    def design(self) -> dict[str, Any]:
        return {"subset_cluster": self.cluster, "subset_count": self.SUBSETS, "subset_share": self.SHARE}

    @abstractmethod
    def value_of(self, images: ImageSet, positions: list[int]) -> float:
        """Measure some of the images.

        Args:
            images: the set; features come from `images.embeddings`, which embeds all of it once.
            positions: which rows to measure, ascending; at least `minimum`.

        Returns:
            The number, finite.
        """

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """Return nothing: groups have no numbers of their own."""
        return []

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Measure all images and every half; see `Metric.results`.

        Returns:
            `value`, `n_groups`, `n_images`, an empty `groups`, `groups_sha256` (which groups, of which category and
            how large: two documents are paired where it agrees), `n_units` (clusters to draw from) and `subsets`:
            `seed`, `n_units`, `n_images`, `value` of each.

        Raises:
            ValueError: fewer images than `minimum`.
        """
        n_images = len(images.rows)
        if n_images < self.minimum:
            raise ValueError(
                f"expected at least {self.minimum} images for {self.name}, got {n_images}; generate more images, "
                "or leave this metric out"
            )
        groups = [images.group_value(group) for group in sorted(images.groups)]
        clusters: dict[str, list[int]] = {}
        for group, cluster in zip(groups, clusters_of(groups, self.cluster), strict=True):
            clusters.setdefault(cluster, []).extend(images.groups[group["group"]])
        members = [clusters[name] for name in sorted(clusters)]
        n_drawn = int(len(members) * self.SHARE)
        draws = (np.random.default_rng(seed).permutation(len(members))[:n_drawn] for seed in range(self.SUBSETS))
        halves = [sorted(position for index in drawn for position in members[index]) for drawn in draws]
        # A number of half the images that may be refused is no measure of the whole's variation.
        if len(clusters) < self.FEWEST or any(len(half) < self.minimum for half in halves):
            halves = []
        return {
            "value": float(self.value_of(images, list(range(n_images)))),
            "n_groups": len(groups),
            "n_images": n_images,
            "groups": [],
            "groups_sha256": hashlib.sha256(canonical_json(groups).encode()).hexdigest(),
            "n_units": len(clusters),
            "subsets": [
                {
                    "seed": seed,
                    "n_units": n_drawn,
                    "n_images": len(half),
                    "value": float(self.value_of(images, half)),
                }
                for seed, half in enumerate(halves)
            ],
        }
