"""What a metric is, a `torchmetrics.Metric` that can also measure a folder of images, and the JSON document of that.

The arithmetic of every metric is its `score`, of tensors. `update` and `compute` apply it to whatever tensors come, as
all of torchmetrics does, in a `MetricCollection` too; the suite applies it to the groups of a folder, since intervals
and paired differences need every group's value. A document (see `measure`) holds those, or label counts, and names
the aggregate that makes one number of them (see `eval.intervals`), so that tables need neither images nor encoder.
Numbers are of images: where groups ended without any, the document says which, under `withheld`.

A number of a whole set of images, such as a Frechet distance, has no values of groups. A `SetMetric` measures
it on all images and again on seeded halves of the categories; the document holds those numbers instead.
"""

import hashlib
import platform
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchmetrics
from torchmetrics.utilities import dim_zero_cat

from eval.encoders import Encoder, Given, Scorer
from eval.files import canonical_json, sealed, write_json
from eval.images import METRICS
from eval.imageset import ImageSet
from eval.intervals import Cluster, GroupValue, clusters_of, mean_of, values_of

#: Packages that a value may depend on.
PACKAGES = ("torch", "numpy", "pillow", "torchvision", "transformers", "open_clip_torch")
#: The numbers of a document where no images are left to measure, since groups were withheld.
UNMEASURED = {"value": None, "n_groups": 0, "n_images": 0, "groups": []}
#: Where a metric finds what it compares a folder of images with; where all is given as features, None.
Folder = str | Path | None


class Metric(torchmetrics.Metric):
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
        aggregate: what makes one number of the groups'; a key of `eval.intervals.AGGREGATES`.
        encoder: what embeds the images, or compares or scores them; `Pixels()` where a metric takes them as they are.
            Features need none, folders do.
        minimum: images that each group must have.
        pooled: what images must share to be measured together; None for those of a group.
        only: patterns such as "direct-*"; where given, only groups whose prompt_id fits one of them are measured.
        of_withheld: the number of a group that ended without images, where a metric is of requests and not of images;
            None: it has none, and the document lists it.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    STATES: ClassVar[tuple[str, ...]] = ("scores",)
    full_state_update = False
    name: str
    version: int = 1
    higher_is_better: bool | None
    unit: str
    description: str
    bounds: tuple[float | None, float | None] = (None, None)
    aggregate: str = "mean"
    encoder: Any = Given()
    minimum: int = 1
    pooled: Cluster | None = None
    only: tuple[str, ...] | None = None
    of_withheld: float | None = None

    def __init__(self, encoder: Scorer | None = None, name: str | None = None, **options: Any) -> None:
        super().__init__(**options)  # what all of torchmetrics takes, such as `compute_on_cpu`
        if encoder is not None:
            if isinstance(self.encoder, Given) and not isinstance(encoder, Encoder):
                raise TypeError(f"expected an encoder of images for {self.name}, got {encoder!r}; PixelEncoder is one")
            self.encoder = encoder
        if name is not None:
            self.name = name
        for state in self.STATES:
            self.add_state(state, [], dist_reduce_fx="cat")
        self.add_state("shared", self._shared(), dist_reduce_fx="max")

    def _shared(self) -> torch.Tensor:
        """Return what metrics must have equal to share states, as a collection lets them where all are equal at first.

        Scores are a metric's own, and NaN equals nothing.
        """
        return torch.tensor(torch.nan)

    @abstractmethod
    def score(self, *inputs: Any) -> Any:
        """Return the number of each image or group, of a `SetMetric` of the set: the arithmetic, in float64."""

    def update(self, *inputs: Any) -> None:
        """Add images or groups.

        Args:
            inputs: what `score` takes. Images may stand for their features, uint8 [..., 3, H, W] or a list of those of
                any sizes, and texts for theirs, where there is an encoder.
        """
        scores = self.score(*map(self._features, inputs)).double().flatten()
        if not len(scores) or not scores.isfinite().all():
            raise ValueError(f"expected images with finite numbers for {self.name}, got {scores.tolist()[:10]}")
        self.scores.append(scores)

    def compute(self) -> torch.Tensor:
        """Return the mean of all numbers, each counted once, float64 []."""
        return self._all("scores").mean()

    def _features(self, given: Any) -> Any:
        """Return what `score` takes of an input; ValueError where it is not finite, which a number might hide."""
        features = self.encoder.features(given)
        if isinstance(features, (torch.Tensor, float)) and not torch.as_tensor(features).isfinite().all():
            raise ValueError(f"expected finite inputs for {self.name}, got NaN or infinity; look at what made them")
        return features

    def _all(self, state: str) -> torch.Tensor:
        """Return what all updates added to a state."""
        if not len(getattr(self, state)):
            how = "images, real=True" if state == "real_features" else "images"
            raise ValueError(f"expected {state.replace('_', ' ')} for {self.name}, got none; add some by update({how})")
        return dim_zero_cat(getattr(self, state))

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        """Return what `score` takes of some images of a folder: their embeddings, or the images without an encoder."""
        return (self.encoder.of(images, positions),)

    def settings(self) -> dict[str, Any]:
        """Return whatever else changes the number, as JSON values: the attributes that `SETTINGS` names."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def design(self) -> dict[str, Any]:
        """Return how parts of the images are drawn to tell how sure the number is, as JSON values."""
        return {}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Return what a reader should know about this measurement, as JSON values."""
        return {}

    def folder(self, argument: str) -> str | Path:
        """Return the folder that an argument names, which `update` does not need."""
        if (found := getattr(self, argument)) is None:
            raise TypeError(f"expected a folder as `{argument}` of {self.name} to measure a folder of images, got None")
        return found

    def prepare(self) -> None:
        """Load the encoder and read other folders now, so that what is missing is found before any work is done."""
        _ = self.settings()
        self.encoder.prepare()

    def require(self, images: ImageSet) -> None:
        """Check that a folder has what the number needs; no image is read, and no network loaded.

        So images that are still to be made can be asked for, by a manifest of theirs.

        Raises:
            FileNotFoundError: a folder to compare with is not there.
            ValueError: there are too few images, here or there.
        """
        small = [pool for pool, members in images.pools(self.pooled).items() if len(members) < self.minimum]
        if small:
            raise ValueError(
                f"expected at least {self.minimum} images in every {self.pooled or 'group'} for {self.name}, got fewer "
                f"in {len(small)}: {', '.join(small[:10])}; generate more images"
            )

    def part(self, images: ImageSet) -> ImageSet:
        """Return the images that the number is of, and the withheld groups that it would have been of."""
        return images

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """Measure every group, in canonical order; where images score by themselves, a group has their mean."""
        self.require(images)
        values = []
        for pool, members in images.pools(self.pooled).items():
            inputs = self.inputs(images, members)
            try:
                value = self.score(*inputs).double().mean().item()
            except ValueError as error:
                raise ValueError(f"in {self.pooled or 'group'} {pool}: {error}") from error
            values.append(images.group_value(pool, members, value=value))
        if self.of_withheld is not None:
            values += [
                {"group": row.group_id, "category": row.category, "n_images": 0, "value": self.of_withheld}
                for row in images.withheld
            ]
        return sorted(values, key=lambda value: value["group"])

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Return the document's numbers: `value`, `n_groups`, `n_images` and `groups`."""
        groups = self.per_group(images)
        if not groups and images.withheld:
            return UNMEASURED
        return {
            "value": mean_of(values_of(groups, self.aggregate)),
            "n_groups": len(groups),
            "n_images": sum(group["n_images"] for group in groups),
            "groups": groups,
        }


class SetMetric(Metric):
    """A number of a whole set of images that is not a mean over groups: a distance between distributions, say.

    Repeated images are no new images, and such numbers are biased by their count, so that nothing is resampled: the
    number is measured on `SUBSETS` halves, drawn without replacement (see `eval.intervals`). Which clusters are drawn
    depends on their names alone, so that two methods get the same halves and their differences are paired.

    Attributes:
        cluster: what is drawn as one: "category", "prompt", or None for single groups.
        minimum: images below which the number is refused, for the set itself; where a half is smaller, of real images
            if need be, or there are fewer than `FEWEST` clusters to draw from, there are no subsets, and the interval
            is not estimable.
    """

    STATES = ("features", "real_features")
    SUBSETS: ClassVar[int] = 20
    SHARE: ClassVar[float] = 0.5
    FEWEST: ClassVar[int] = 6
    cluster: Cluster | None = "category"
    minimum = 2
    aggregate = "subsets"

    def _shared(self) -> torch.Tensor:
        """Features of one encoder are features of it, whatever is made of them."""
        return torch.tensor([*self.encoder.name.encode()])

    def update(self, images: torch.Tensor, real: bool = False) -> None:
        """Add images, uint8 [..., 3, H, W], or features [..., D]; `real` ones are only compared with, if at all."""
        features = self._features(images)
        (self.real_features if real else self.features).append(features.reshape(-1, features.shape[-1]))

    def compute(self) -> torch.Tensor:
        """Return the number of all images together, float64 []."""
        return torch.tensor(self.score(self._all("features")), dtype=torch.float64)

    def design(self) -> dict[str, Any]:
        return {"subset_cluster": self.cluster, "subset_count": self.SUBSETS, "subset_share": self.SHARE}

    def half(self, images: ImageSet, positions: Sequence[int], seed: int) -> tuple[Sequence[int], ...]:
        """Return what `inputs` takes of a half of the images: their positions, and those in other sets."""
        return (positions,)

    def require(self, images: ImageSet) -> None:
        if (n_images := len(images.rows)) < self.minimum:
            raise ValueError(
                f"expected at least {self.minimum} images for {self.name}, got {n_images}; generate more images, "
                "or leave this metric out"
            )

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Measure all images and every half: as `Metric.results`, with an empty `groups`, and beside

        `groups_sha256` (which groups, of which category and how large: two documents are paired where it agrees),
        `n_units` (clusters to draw from) and `subsets`: `seed`, `n_units`, `n_images`, `value` of each.
        """
        n_images = len(images.rows)
        if n_images < self.minimum and images.withheld:
            return UNMEASURED | {"n_groups": len(images.groups), "n_images": n_images}
        self.require(images)
        groups = [images.group_value(group) for group in sorted(images.groups)]
        clusters: dict[str, list[int]] = {}
        for group, cluster in zip(groups, clusters_of(groups, self.cluster), strict=True):
            clusters.setdefault(cluster, []).extend(images.groups[group["group"]])
        members = [clusters[name] for name in sorted(clusters)]
        n_drawn = int(len(members) * self.SHARE)
        halves = []
        for seed in range(self.SUBSETS):
            drawn = np.random.default_rng(seed).permutation(len(members))[:n_drawn]
            halves.append(self.half(images, sorted(place for index in drawn for place in members[index]), seed))
        # A number of half the images that may be refused is no measure of the whole's variation.
        if len(clusters) < self.FEWEST or any(len(part) < self.minimum for half in halves for part in half):
            halves = []
        parts = ((list(range(n_images)),), *halves)
        value, *values = (float(self.score(*self.inputs(images, *part))) for part in parts)
        return {
            "value": value,
            "n_groups": len(groups),
            "n_images": n_images,
            "groups": [],
            "groups_sha256": hashlib.sha256(canonical_json(groups).encode()).hexdigest(),
            "n_units": len(clusters),
            "subsets": [
                {"seed": seed, "n_units": n_drawn, "n_images": len(half[0]), "value": found}
                for seed, (half, found) in enumerate(zip(halves, values, strict=True))
            ],
        }


def is_current(document: Mapping[str, Any], metric: Metric, folder: str | Path | ImageSet) -> bool:
    """Tell whether a document says what `metric` would find in `folder` now, without computing it."""
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    expected = _identity(metric, images.only(metric.only))
    return {key: document.get(key) for key in expected} == expected


def measure(metric: Metric, folder: str | Path | ImageSet, path: str | Path | None = None) -> dict[str, Any]:
    """Measure a folder, and write and return the metric's document, atomically.

    Args:
        folder: a run folder, a plain folder, or an `ImageSet`, which shares embeddings among metrics.
        path: where the document goes; `metrics/<metric's name>.json` in the folder if not given.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    images = images.only(metric.only)
    shown = not images.withheld or metric.of_withheld is not None or bool(metric.part(images).rows)
    document = sealed(
        {
            **_identity(metric, images),
            "description": metric.description,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            **(metric.results(images) if shown else UNMEASURED),
            "details": metric.details(images) if shown else {},
            "environment": environment(),
        }
    )
    write_json(path or images.folder / METRICS / f"{metric.name}.json", document)
    return document


def environment() -> dict[str, str]:
    """Return the versions of Python and of the packages that a value may depend on, where installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _identity(metric: Metric, images: ImageSet) -> dict[str, Any]:
    withheld = metric.part(images).withheld if images.withheld else ()
    told = [{"group": row.group_id, "category": row.category, "status": row.status} for row in withheld]
    return {
        "metric": metric.name,
        "version": metric.version,
        "settings": metric.settings(),
        "aggregate": metric.aggregate,
        **metric.design(),
        "bounds": list(metric.bounds),
        **({} if metric.only is None else {"only": list(metric.only)}),
        "encoder": {"name": metric.encoder.name, "id": metric.encoder.id},
        "manifest_sha256": images.manifest_hash,
        **({"withheld" if metric.of_withheld is None else "counted_without_images": told} if told else {}),
    }
