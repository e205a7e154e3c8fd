"""One interface for what is measured of a folder of images, and the JSON document each measurement becomes.

A metric gives every group a value, or label counts, and names the aggregate that makes one number of them
(see `eval.aggregates`). The document holds the groups' values, so that intervals, paired differences and
tables need neither images nor encoder. The arithmetic is in `eval.diversity`, `eval.attributes` and
`eval.alignment`.

A number of a whole set of images, such as a Frechet distance, has no values of groups. A `SetMetric` measures
it on all images and again on seeded halves of the categories; the document holds those numbers instead.
"""

from __future__ import annotations

import hashlib
import platform
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from eval.aggregates import GroupValue, aggregate_named
from eval.alignment import clip_score
from eval.attributes import MINIMUM_IMAGES, label_embeddings, minimum_images, zero_shot_labels
from eval.cache import EmbeddingCache, embed_folder
from eval.diversity import mean_pairwise_distance, mean_pairwise_similarity, vendi_score
from eval.encoders import Encoder
from eval.files import canonical_json, check_seal, read_json, remembered_hash, sealed, write_json
from eval.images import METRICS, ManifestRow, canonical_order, read_manifest, rows_hash
from eval.intervals import Cluster, units_of

PACKAGES = ("torch", "numpy", "pillow", "torchvision", "transformers", "open_clip_torch")


class ImageSet:
    """The images of a folder with their groups and texts, embedded at most once by each encoder.

    Args:
        folder: what the rows' paths are relative to.
        rows: the images; put into canonical order.
        cache: where embeddings are kept between runs; None keeps them in this object only.
        batch_size: images a call of an encoder; does not change any result.
        progress: show a bar while images are embedded.

    Attributes:
        groups: for each group id the positions of its images in `rows`, in canonical order.
        texts: the prompt of each row.
    """

    def __init__(
        self,
        folder: str | Path,
        rows: Sequence[ManifestRow],
        cache: EmbeddingCache | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.rows = canonical_order(rows)
        self.cache = cache
        self.batch_size = batch_size
        self.progress = progress
        self.texts = [row.prompt for row in self.rows]
        self.groups: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            self.groups.setdefault(row.group_id, []).append(position)
        self._images: dict[str, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        cache: EmbeddingCache | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> ImageSet:
        """Read a run folder or a plain folder; see `eval.images.read_manifest`."""
        return cls(folder, read_manifest(folder), cache, batch_size, progress)

    def only(self, patterns: Sequence[str] | None) -> ImageSet:
        """Return the images whose prompt_id fits a shell pattern, such as "direct-*"; all of them for None.

        Raises:
            ValueError: there are none.
        """
        if patterns is None:
            return self
        rows = [row for row in self.rows if any(fnmatchcase(row.prompt_id, pattern) for pattern in patterns)]
        if not rows:
            raise ValueError(
                f"expected prompts named {' or '.join(patterns)} in {self.folder}, got none, but for example "
                f"{self.rows[0].prompt_id}; leave the metric out or change its `only`"
            )
        return ImageSet(self.folder, rows, self.cache, self.batch_size, self.progress)

    @cached_property
    def manifest_hash(self) -> str:
        """Identity of the set of images; see `eval.images.rows_hash`."""
        return rows_hash(self.folder, self.rows, self.cache.hash_of if self.cache else remembered_hash)

    def embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the images' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._images:
            self._images[encoder.id] = embed_folder(
                self.rows, self.folder, encoder, self.cache, self.batch_size, self.progress
            )
        return self._images[encoder.id]

    def text_embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the prompts' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._texts:
            unique = list(dict.fromkeys(self.texts))
            embedded = encoder.embed_texts(unique)
            position = {text: index for index, text in enumerate(unique)}
            self._texts[encoder.id] = embedded[[position[text] for text in self.texts]]
        return self._texts[encoder.id]

    def pools(self, shared: Literal["prompt_id", "category"] | None) -> dict[str, list[int]]:
        """Return positions by what the images share, in canonical order; by group for None.

        Pools of groups are named as groups are, `bird/all`, so that each is a cluster of its own.
        """
        if shared is None:
            return self.groups
        found: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            found.setdefault(f"{getattr(row, shared)}/all", []).append(position)
        return dict(sorted(found.items()))

    def group_value(self, group_id: str, **found: Any) -> GroupValue:
        """Describe a group for a result: id, category and number of images, and what was found in it."""
        members = self.groups[group_id]
        return {
            "group": group_id,
            "category": self.rows[members[0]].category,
            "n_images": len(members),
            **found,
        }


class Judge(Protocol):
    """What a number depends on beside the images: an encoder, or whatever else compares or scores them.

    Attributes:
        name: for people, as printed in tables.
        id: identity for caches and result files: it changes when the weights do.
    """

    name: str
    id: str


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
        aggregate: name of what makes one number of the groups'; a key of `eval.aggregates.AGGREGATES`.
        encoder: what embeds the images; None for a metric that compares pixels itself, which then has a `judge`
            of its own.
        only: patterns such as "direct-*"; where given, only groups whose prompt_id fits one of them are measured.
    """

    name: str
    version: int
    higher_is_better: bool | None
    unit: str
    description: str
    bounds: tuple[float | None, float | None] = (None, None)
    aggregate: str = "mean"
    only: tuple[str, ...] | None = None

    def __init__(self, encoder: Encoder | None, name: str | None = None) -> None:
        self.encoder = encoder
        if name is not None:
            self.name = name

    @property
    def judge(self) -> Judge:
        """What is named as the document's encoder; a metric without one says here what it compares with."""
        if self.encoder is None:
            raise TypeError(
                f"expected an encoder for {self.name}, got None; give one, or define `judge` in {type(self).__name__}"
            )
        return self.encoder

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
        if self.encoder is not None:
            self.encoder.prepare()

    @abstractmethod
    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """Measure every group, in canonical order."""

    def results(self, images: ImageSet) -> dict[str, Any]:
        """Return the document's numbers: `value`, `n_groups`, `n_images` and `groups`."""
        groups = self.per_group(images)
        return {
            "value": aggregate_named(self.aggregate).value(groups),
            "n_groups": len(groups),
            "n_images": sum(group["n_images"] for group in groups),
            "groups": groups,
        }


class SetMetric(Metric):
    """A number of a whole set of images that is not a mean over groups: a distance between distributions, say.

    How sure it is cannot come from resampling with replacement: repeated images are no new images, and such
    numbers are biased by their count. So it is measured on `SUBSETS` halves, drawn without replacement: the
    variance among halves estimates that of the whole (see `eval.intervals.interval_of`). What is drawn are
    whole categories, since groups of one are not independent. The halves depend on the groups' ids and categories
    alone, so two methods get the same ones and their differences are paired.

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
        """See `Metric.design`."""
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
        for group, unit in zip(groups, units_of(groups, self.cluster), strict=True):
            clusters.setdefault(unit, []).extend(images.groups[group["group"]])
        halves = self._halves(clusters)
        # A number of half the images that may be refused is no measure of the whole's variation.
        if any(len(positions) < self.minimum for _, positions in halves):
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
                    "n_units": n_units,
                    "n_images": len(positions),
                    "value": float(self.value_of(images, positions)),
                }
                for seed, (n_units, positions) in enumerate(halves)
            ],
        }

    def _halves(self, clusters: Mapping[str, list[int]]) -> list[tuple[int, list[int]]]:
        """Return for each seed the number of clusters drawn and the positions of their images, ascending."""
        if len(clusters) < self.FEWEST:
            return []
        members = [clusters[name] for name in sorted(clusters)]
        n_units = int(len(members) * self.SHARE)
        drawn = (np.random.default_rng(seed).permutation(len(members))[:n_units] for seed in range(self.SUBSETS))
        return [(n_units, sorted(position for index in chosen for position in members[index])) for chosen in drawn]


class _OfEmbeddings(Metric):
    """A metric that is a pure function of the embeddings [G, K, D] of groups of K images.

    Attributes:
        minimum: images that each group must have.
        pooled: what images must share to be measured together; None for those of a group.
    """

    minimum = 1
    pooled: Literal["prompt_id", "category"] | None = None

    @abstractmethod
    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[G, K, D] -> [G]."""

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`."""
        pools = images.pools(self.pooled)
        small = [pool for pool, members in pools.items() if len(members) < self.minimum]
        if small:
            raise ValueError(
                f"expected at least {self.minimum} images in every {(self.pooled or 'group').removesuffix('_id')} for "
                f"{self.name}, got fewer in {len(small)}: {', '.join(small[:10])}; generate more images"
            )
        embeddings = images.embeddings(self.encoder)
        by_size: dict[int, list[str]] = {}
        for pool, members in pools.items():
            by_size.setdefault(len(members), []).append(pool)
        values: dict[str, float] = {}
        for names in by_size.values():
            stacked = torch.stack([embeddings[pools[name]] for name in names])
            values.update(zip(names, self.measure_groups(stacked).tolist(), strict=True))
        return [
            {
                "group": pool,
                "category": images.rows[members[0]].category,
                "n_images": len(members),
                "value": values[pool],
            }
            for pool, members in pools.items()
        ]


class PairwiseSimilarity(_OfEmbeddings):
    """Mean cosine similarity over the pairs of images of a group."""

    name = "pairwise_similarity"
    version = 1
    higher_is_better = False
    unit = "cosine, -1 to 1"
    bounds = (-1, 1)
    description = "mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """See `eval.diversity.mean_pairwise_similarity`."""
        return mean_pairwise_similarity(embeddings)


class PairwiseDistance(_OfEmbeddings):
    """Mean cosine distance over the pairs of images of a group."""

    name = "pairwise_distance"
    version = 1
    higher_is_better = True
    unit = "1 - cosine, 0 to 2"
    bounds = (0, 2)
    description = "1 - mean cosine similarity of the embeddings over the pairs of different images of a group"
    minimum = 2

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """See `eval.diversity.mean_pairwise_distance`."""
        return mean_pairwise_distance(embeddings)


class VendiScore(_OfEmbeddings):
    """Effective number of different images in a group; only for groups of one size.

    Args:
        encoder: what embeds the images.
        q: order of the entropy, > 0; 1 is the Vendi Score.
        name: for tables.
    """

    name = "vendi_score"
    version = 1
    higher_is_better = True
    unit = "images, 1 to the group's size"
    bounds = (1, None)
    description = "effective number of different images of a group: exp of the entropy of the eigenvalues of K / n"

    def __init__(self, encoder: Encoder, q: float = 1.0, name: str | None = None) -> None:
        super().__init__(encoder, name)
        if not q > 0:
            raise ValueError(f"expected an order q > 0, got {q}; 1 is the Vendi Score")
        self.q = float(q)

    def settings(self) -> dict[str, Any]:
        """See `Metric.settings`."""
        return {"q": "inf" if self.q == float("inf") else self.q}

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`; groups of several sizes are an error that lists them."""
        sizes = Counter(len(members) for members in images.pools(self.pooled).values())
        if len(sizes) > 1:
            listing = ", ".join(f"{count} groups of {size}" for size, count in sorted(sizes.items()))
            raise ValueError(
                f"expected groups of one size, since a Vendi Score grows with it, got {listing}; "
                "measure folders of one size each"
            )
        return super().per_group(images)

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """See `eval.diversity.vendi_score`."""
        return vendi_score(embeddings, self.q)


class CategoryPooledSimilarity(PairwiseSimilarity):
    """Mean cosine similarity over all pairs of all images of a category: what the paper's script reports.

    Most of these pairs come from different groups, with other noises and other wordings, and say little about
    images that were made together: report `PairwiseSimilarity`, within groups, beside it. An image occurs in
    pairs with every other one of its category, so neither pairs nor groups are independent; categories are.
    They are therefore the units of this document: its "groups" are whole categories, and intervals and tests
    say how the number would vary with other categories.
    """

    name = "category_pooled_similarity"
    description = (
        "mean cosine similarity over the pairs of different images of a category, whatever their group; mean over "
        "categories, which are the units"
    )
    pooled = "category"


class ReleasedMeanSimilarity(_OfEmbeddings):
    """The mean similarity as the released script has it: of all images of a prompt, each one's 1 to itself included.

    Only to match published numbers: the script's matrix is that of a prompt's images of all seeds, most pairs of which
    were not made together. With the mean similarity s of the K images it is (1 + (K - 1) s) / K, and so depends on K.
    """

    name = "released_mean_similarity"
    version = 2
    pooled = "prompt_id"
    higher_is_better = False
    unit = "cosine, -1 to 1"
    description = (
        "mean over the whole similarity matrix of a prompt's images of all seeds, its diagonal of ones included, as "
        "the released script"
    )

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Average the whole matrix: [G, K, D] -> [G]."""
        k = embeddings.shape[1]
        return torch.ones(len(embeddings)) if k == 1 else (1 + (k - 1) * mean_pairwise_similarity(embeddings)) / k


class ReleasedVendi(VendiScore):
    """The "Vendi Score" as the released script has it: eigenvalues of K itself instead of K / n.

    Only to match published numbers: the script's K is that of a prompt's n images of all seeds. With eigenvalues l of
    K / n (summing to 1) and the Vendi Score V, it is
    (V / n)^n: 1 where all n images differ wholly, n^-n where all are the same, and no number of images at all.
    """

    name = "released_vendi"
    version = 2
    pooled = "prompt_id"
    higher_is_better = True
    unit = "no unit, 0 to 1"
    bounds = (0, 1)
    description = (
        "exp of -sum m log m over the eigenvalues m of the K of a prompt's images of all seeds, not K / n, as the "
        "released script"
    )

    def __init__(self, encoder: Encoder, name: str | None = None) -> None:
        super().__init__(encoder, name=name)

    def measure_groups(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score groups: [G, K, D] -> [G]; -sum (n l) log(n l) is n (log V - log n)."""
        n = embeddings.shape[1]
        return (vendi_score(embeddings) / n) ** n


class ClipScore(Metric):
    """Mean CLIPScore of the images of a group against their prompt."""

    name = "clip_score"
    version = 1
    higher_is_better = True
    unit = "100 max(cosine, 0), 0 to 100"
    bounds = (0, 100)
    description = "mean over a group's images of 100 max(cos, 0) of image and prompt (Hessel et al. 2021 use 2.5)"

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`."""
        scores = clip_score(images.embeddings(self.encoder), images.text_embeddings(self.encoder))
        return [
            images.group_value(group, value=scores[members].mean().item()) for group, members in images.groups.items()
        ]

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many different prompts there are and how many the text tower cannot read to the end."""
        prompts = sorted(set(images.texts))
        return {"n_prompts": len(prompts), "n_prompts_truncated": self.encoder.count_truncated(prompts)}


class AttributeEntropy(Metric):
    """Entropy of zero-shot labels, pooled over the groups of a category, mean over categories.

    A category with fewer images than `eval.attributes.minimum_images` of its labels is left out, by its number of
    images alone and so the same for every method; the document lists it.

    Args:
        encoder: one with a text tower.
        labels: the labels to choose among: for each category its own, or one list for all. Images of a
            category that is not named are left out.
        templates: texts with one `{}` for the label; their embeddings are averaged.
        name: for tables, when there are several kinds of label.
    """

    name = "attribute_entropy"
    version = 2
    higher_is_better = True
    unit = "nats"
    bounds = (0, None)
    description = "mean over categories of the entropy (Miller-Madow, nats) of the pooled zero-shot labels"
    aggregate = "category_entropy"

    def __init__(
        self,
        encoder: Encoder,
        labels: Mapping[str, Sequence[str]] | Sequence[str],
        templates: Sequence[str] = ("a photo of a {}",),
        name: str | None = None,
    ) -> None:
        super().__init__(encoder, name)
        for given in (templates, labels, *(labels.values() if isinstance(labels, Mapping) else ())):
            if isinstance(given, str):
                raise ValueError(f"expected a list of labels and of templates for {self.name}, got the text {given!r}")
        # plain containers, whatever a configuration library hands over
        self.labels = (
            {str(category): [str(label) for label in labels[category]] for category in labels}
            if isinstance(labels, Mapping)
            else [str(label) for label in labels]
        )
        self.templates = [str(template) for template in templates]

    def settings(self) -> dict[str, Any]:
        """See `Metric.settings`."""
        return {"labels": self.labels, "templates": self.templates}

    def _labels_of(self, category: str) -> list[str] | None:
        return self.labels.get(category) if isinstance(self.labels, dict) else self.labels

    def _too_small(self, images: ImageSet) -> dict[str, str]:
        """Say of categories that have labels but too few images for them: how many of how many."""
        counts = Counter(row.category for row in images.rows)
        needed = {name: minimum_images(len(labels)) for name in counts if (labels := self._labels_of(name))}
        return {name: f"{counts[name]} of {n} images" for name, n in sorted(needed.items()) if counts[name] < n}

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`; groups of categories without labels, or with too few images, are left out."""
        embeddings = images.embeddings(self.encoder)
        too_small = self._too_small(images)
        texts: dict[str, torch.Tensor] = {}
        values = []
        for group, members in images.groups.items():
            category = images.rows[members[0]].category
            labels = self._labels_of(category)
            if labels is None or category in too_small:
                continue
            if category not in texts:
                texts[category] = label_embeddings(self.encoder, labels, self.templates)
            chosen = zero_shot_labels(embeddings[members], texts[category]).tolist()
            counts = Counter(labels[index] for index in chosen)
            values.append(images.group_value(group, counts=dict(sorted(counts.items()))))
        if not values and too_small:
            raise ValueError(
                f"expected at least two images a label, and {MINIMUM_IMAGES}, in a category for {self.name}, got "
                f"{', '.join(f'{name}: {found}' for name, found in list(too_small.items())[:10])}; generate more "
                "groups a category, give fewer labels, or leave this metric out"
            )
        if not values:
            found = sorted({row.category for row in images.rows})
            raise ValueError(
                f"expected images of the categories {sorted(self.labels)} for {self.name}, got {found[:10]}; "
                "give labels for the categories of the images"
            )
        return values

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say which categories were left out for want of labels, and which for want of images."""
        categories = sorted({row.category for row in images.rows})
        return {
            "categories_left_out": [name for name in categories if self._labels_of(name) is None],
            "categories_too_small": self._too_small(images),
        }


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a metric's document.

    Raises:
        ValueError: it is none, or holds other values than were written; the message names it.
    """
    try:
        document = read_json(path)
    except ValueError as error:
        raise ValueError(f"expected a metric's JSON in {path}, got another file ({error}); delete it") from error
    if not isinstance(document, dict) or "metric" not in document or "groups" not in document:
        raise ValueError(f"expected a metric's document in {path}, got other JSON; delete it and measure again")
    check_seal(document, path)
    return document


def is_current(document: Mapping[str, Any], metric: Metric, folder: str | Path | ImageSet) -> bool:
    """Tell whether a document says what `metric` would find in `folder` now, without computing it.

    Metric, version, settings, aggregate, bounds, how subsets are drawn, the encoder's (or other judge's) id and the
    folder's set of images must agree.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    expected = _identity(metric, images.only(metric.only).manifest_hash)
    return {key: document.get(key) for key in expected} == expected


def measure(
    metric: Metric,
    folder: str | Path | ImageSet,
    cache: EmbeddingCache | None = None,
    path: str | Path | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a folder and write the metric's document, atomically.

    Args:
        metric: what to measure.
        folder: a run folder, a plain folder, or an `ImageSet` to share embeddings among metrics (it brings
            its own cache, batch size and progress).
        cache: where embeddings are kept.
        path: where the document goes; `metrics/<metric's name>.json` in the folder if not given.
        batch_size: images a call of the encoder; does not change the result.
        progress: show a bar while images are embedded.

    Returns:
        The document, as written.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder, cache, batch_size, progress)
    images = images.only(metric.only)
    document = sealed(
        {
            **_identity(metric, images.manifest_hash),
            "description": metric.description,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            **metric.results(images),
            "details": metric.details(images),
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


def _identity(metric: Metric, images_hash: str) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "version": metric.version,
        "settings": metric.settings(),
        "aggregate": metric.aggregate,
        **metric.design(),
        "bounds": list(metric.bounds),
        **({} if metric.only is None else {"only": list(metric.only)}),
        "encoder": {"name": metric.judge.name, "id": metric.judge.id},
        "manifest_sha256": images_hash,
    }
