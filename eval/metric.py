"""The base classes of metrics: `torchmetrics.Metric`s that also measure a folder of images and write a JSON document.

`score` is the arithmetic on tensors. `update` and `compute` apply it as in torchmetrics; `measure` applies it to the
groups of a folder and writes every group's value, so that `eval.intervals` needs neither images nor an encoder.
"""

import hashlib
import inspect
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

from eval.encoders import Encoder, PrecomputedFeatures, Scorer
from eval.files import canonical_json, read_document, with_checksum, write_json
from eval.images import METRICS, scores_path
from eval.imageset import ImageSet
from eval.intervals import Cluster, GroupValue, clusters_of, mean_of, values_of

#: Packages on which a value may depend.
PACKAGES = ("torch", "numpy", "pillow", "torchvision", "transformers", "open_clip_torch")
#: The numbers of a document if all images were withheld.
UNMEASURED: dict[str, Any] = {"value": None, "n_groups": 0, "n_images": 0, "groups": []}
#: A folder of images to compare with; None if the caller passes features to `update`.
Folder = str | Path | None


class Metric(torchmetrics.Metric):
    """A number of every group of images. The first sentence of a metric's docstring describes it in documents.

    Attributes:
        SETTINGS: names of the attributes that change the number.
        name: name in tables.
        version: raise it whenever the same images could give another number.
        higher_is_better: None if neither direction is better.
        unit: unit and range of the number.
        bounds: smallest and largest possible number, None for no limit. Intervals stay within the bounds.
        aggregate: how the groups' values become one number; a key of `eval.intervals.AGGREGATES`.
        encoder: embeds, compares or scores the images. To measure a folder, an encoder or `Pixels()` is needed.
        minimum: number of images that each group must have.
        pooled: what images have in common that are measured together; None for a group.
        only: patterns such as "direct-*" for the prompt_ids of the groups to measure; None for all.
        of_withheld: the value of a group that ended without images, for metrics of requests; None if it has no value.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    STATES: ClassVar[tuple[str, ...]] = ("scores",)
    full_state_update = False
    name: str
    version: int = 1
    higher_is_better: bool | None
    unit: str
    bounds: tuple[float | None, float | None] = (None, None)
    aggregate: str = "mean"
    encoder: Any = PrecomputedFeatures()
    minimum: int = 1
    pooled: Cluster | None = None
    only: tuple[str, ...] | None = None
    of_withheld: float | None = None

    def __init__(self, encoder: Scorer | None = None, name: str | None = None, **options: Any) -> None:
        super().__init__(**options)  # options of torchmetrics, such as `compute_on_cpu`
        if encoder is not None:
            if isinstance(self.encoder, PrecomputedFeatures) and not isinstance(encoder, Encoder):
                raise TypeError(f"expected an encoder of images for {self.name}, got {encoder!r}; PixelEncoder is one")
            self.encoder = encoder
        if name is not None:
            self.name = name
        for state in self.STATES:
            self.add_state(state, [], dist_reduce_fx="cat")
        self.add_state("shared", self._shared(), dist_reduce_fx="max")

    @property
    def description(self) -> str:
        """The first sentence of the class's docstring."""
        return (inspect.getdoc(type(self)) or self.name).partition("\n\n")[0].replace("\n", " ")

    def _shared(self) -> torch.Tensor:
        """Return a value that is equal for metrics that may share their states in a `MetricCollection`.

        NaN differs from everything, because scores cannot be shared.
        """
        return torch.tensor(torch.nan)

    @abstractmethod
    def score(self, *inputs: Any) -> Any:
        """Compute the number of each image or group, or of the whole set in a `SetMetric`, in float64."""

    def update(self, *inputs: Any) -> None:
        """Add images or groups: the arguments of `score`.

        With an encoder, images (uint8 [..., 3, H, W] or a list of images of any sizes) and texts may replace features.
        """
        scores = self.score(*map(self._features, inputs)).double().flatten()
        if not len(scores) or not scores.isfinite().all():
            raise ValueError(f"expected images with finite numbers for {self.name}, got {scores.tolist()[:10]}")
        self.scores.append(scores)

    def compute(self) -> torch.Tensor:
        """Return the mean of all numbers, float64 []."""
        return self._all("scores").mean()

    def _features(self, inputs: Any) -> Any:
        """Return an argument of `score`; raise ValueError if it is not finite, which the number might hide."""
        features = self.encoder.features(inputs)
        if isinstance(features, (torch.Tensor, float)) and not torch.as_tensor(features).isfinite().all():
            raise ValueError(f"expected finite inputs for {self.name}, got NaN or infinity; look at what made them")
        return features

    def _all(self, state: str) -> torch.Tensor:
        """Return the concatenated values of a state."""
        if not len(getattr(self, state)):
            how = "images, real=True" if state == "real_features" else "images"
            raise ValueError(f"expected {state.replace('_', ' ')} for {self.name}, got none; add some by update({how})")
        return dim_zero_cat(getattr(self, state))

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of `score` for some images of a folder."""
        return (self.encoder.of(images, positions),)

    def settings(self) -> dict[str, Any]:
        """Return everything else that changes the number, as JSON values."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def design(self) -> dict[str, Any]:
        """Return how subsets are drawn for the interval, as JSON values."""
        return {}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Return facts about this measurement for a reader, as JSON values."""
        return {}

    def folder(self, argument: str) -> str | Path:
        """Return the folder in an argument; raise TypeError if it is None."""
        path = getattr(self, argument)
        if path is None:
            raise TypeError(f"expected a folder as `{argument}` of {self.name} to measure a folder of images, got None")
        return path

    def prepare(self) -> None:
        """Load the encoder and read other folders, so that missing files are reported before any work is done."""
        _ = self.settings()
        self.encoder.prepare()

    def require(self, images: ImageSet) -> None:
        """Check that a manifest lists enough images; they need not exist yet.

        Raises:
            FileNotFoundError: a folder to compare with does not exist.
            ValueError: there are too few images in the manifest or in a folder to compare with.
        """
        small = [pool for pool, members in images.pools(self.pooled).items() if len(members) < self.minimum]
        if small:
            raise ValueError(
                f"expected at least {self.minimum} images in every {self.pooled or 'group'} for {self.name}, got fewer "
                f"in {len(small)}: {', '.join(small[:10])}; generate more images"
            )

    def part(self, images: ImageSet) -> ImageSet:
        """Return the images and withheld groups that this metric measures."""
        return images

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """Measure every group, in canonical order; if `score` returns a number per image, take their mean."""
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
    """A number of a whole set of images that is not a mean over groups, such as a distance between distributions.

    The number depends on the number of different images, so a bootstrap would be biased. Instead it is measured on
    `SUBSETS` halves of the clusters, drawn without replacement (see `eval.intervals`). The draws depend only on the
    names of the clusters, so two methods get the same halves and their differences are paired.

    Attributes:
        cluster: what is drawn together: "category", "prompt", or None for single groups.
        minimum: number of images that the set must have. There are no halves, and no interval, if a half has fewer
            images or real images, or if there are fewer than `FEWEST` clusters.
    """

    STATES = ("features", "real_features")
    SUBSETS: ClassVar[int] = 20
    SHARE: ClassVar[float] = 0.5
    FEWEST: ClassVar[int] = 6
    cluster: Cluster | None = "category"
    minimum = 2
    aggregate = "subsets"

    def _shared(self) -> torch.Tensor:
        return torch.tensor([*self.encoder.name.encode()])  # metrics of one encoder share its features

    def update(self, images: torch.Tensor, real: bool = False) -> None:
        """Add images, uint8 [..., 3, H, W], or features [..., D]; `real` marks those to compare with."""
        features = self._features(images)
        (self.real_features if real else self.features).append(features.reshape(-1, features.shape[-1]))

    def compute(self) -> torch.Tensor:
        """Return the number of all images, float64 []."""
        return torch.tensor(self.score(self._all("features")), dtype=torch.float64)

    def design(self) -> dict[str, Any]:
        return {"subset_cluster": self.cluster, "subset_count": self.SUBSETS, "subset_share": self.SHARE}

    def half(self, images: ImageSet, positions: Sequence[int], seed: int) -> tuple[Sequence[int], ...]:
        """Return the arguments of `inputs` for a half: the positions of its images, and those in other sets."""
        return (positions,)

    def require(self, images: ImageSet) -> None:
        if (n_images := len(images.rows)) < self.minimum:
            raise ValueError(
                f"expected at least {self.minimum} images for {self.name}, got {n_images}; generate more images, "
                "or leave this metric out"
            )

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Measure all images and every half.

        Returns:
            As `Metric.results`, with empty `groups`, and with `groups_sha256` (equal for documents that can be paired),
            `n_units` (number of clusters) and `subsets` (`seed`, `n_units`, `n_images` and `value` of each half).
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
            positions = sorted(position for index in drawn for position in members[index])
            halves.append(self.half(images, positions, seed))
        # A half that is too small for the number says nothing about the variation of the whole set.
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
                {"seed": seed, "n_units": n_drawn, "n_images": len(half[0]), "value": value_of_half}
                for seed, (half, value_of_half) in enumerate(zip(halves, values, strict=True))
            ],
        }


def is_current(document: Mapping[str, Any], metric: Metric, folder: str | Path | ImageSet) -> bool:
    """Return whether a document is up to date for a metric, a folder and its images, without computing the number."""
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    expected = _identity(metric, images.only(metric.only))
    return {key: document.get(key) for key in expected} == expected


def current_document(metric: Metric, images: ImageSet, folder: Path) -> dict[str, Any] | None:
    """Read a metric's document of some images from a folder of documents; None if there is none that `is_current`.

    Raises:
        ValueError: the document is damaged; the message names the file.
    """
    path = scores_path(folder, metric.name, metric.encoder.id)
    document = read_document(path) if path.exists() else None
    return document if document is not None and is_current(document, metric, images) else None


def measure(metric: Metric, folder: str | Path | ImageSet, path: str | Path | None = None) -> dict[str, Any]:
    """Measure a folder, write the metric's document atomically, and return it.

    Args:
        metric: the metric.
        folder: a folder of images, or an `ImageSet`, which shares embeddings between metrics.
        path: path of the document; `metrics/<metric's name>.json` in the folder by default.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    images = images.only(metric.only)
    measurable = not images.withheld or metric.of_withheld is not None or bool(metric.part(images).rows)
    document = with_checksum(
        {
            **_identity(metric, images),
            "description": metric.description,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            **(metric.results(images) if measurable else UNMEASURED),
            "details": metric.details(images) if measurable else {},
            "environment": environment(),
        }
    )
    write_json(path or images.folder / METRICS / f"{metric.name}.json", document)
    return document


def environment() -> dict[str, str]:
    """Return the versions of Python and of the installed packages on which a value may depend."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _identity(metric: Metric, images: ImageSet) -> dict[str, Any]:
    withheld = metric.part(images).withheld if images.withheld else ()
    listing = [{"group": row.group_id, "category": row.category, "status": row.status} for row in withheld]
    identity = {
        "metric": metric.name,
        "version": metric.version,
        "settings": metric.settings(),
        "aggregate": metric.aggregate,
        **metric.design(),
        "bounds": list(metric.bounds),
        "encoder": {"name": metric.encoder.name, "id": metric.encoder.id},
        "manifest_sha256": images.manifest_hash,
    }
    if metric.only is not None:
        identity["only"] = list(metric.only)
    if listing:
        identity["withheld" if metric.of_withheld is None else "counted_without_images"] = listing
    return identity
