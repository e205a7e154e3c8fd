"""How evenly are the kinds of a subject shown? Zero-shot labels and the entropy of their counts.

A label is the text with the largest cosine; its embedding is the normalised mean over prompt templates (Radford et al.
2021, Sec. 3.1.4).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from eval.encoders import Encoder
from eval.imageset import ImageSet
from eval.intervals import MINIMUM_IMAGES, GroupValue, entropy
from eval.metric import Metric


def minimum_images(labels: int) -> int:
    """Return how many images a corrected entropy needs: two per label, at least `MINIMUM_IMAGES`.

    The remaining bias depends on the number of images per label (docs/metrics.md). All labels count, not only those
    that were seen; otherwise the more diverse set of images would be refused.
    """
    return max(MINIMUM_IMAGES, 2 * labels)


def label_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Embed L >= 2 labels as the normalised mean over templates with one `{}` each: float32 [L, D]."""
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError(f"expected at least 2 different labels, got {list(labels)}; entropy needs a choice")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"expected templates with one {{}} for the label, got {wrong or 'none'}; 'a photo of a {{}}'")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = encoder.embed_texts(texts).reshape(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(dim=1), dim=-1)


def zero_shot_labels(image_embeddings: torch.Tensor, label_embeddings: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest label of each image: [N, D], [L, D] -> int64 [N]."""
    return (F.normalize(image_embeddings, dim=-1) @ F.normalize(label_embeddings, dim=-1).T).argmax(dim=-1)


class Attributes(Metric):
    """A metric of zero-shot labels; `update` takes embeddings of images, [..., D], and of labels, [L, D].

    Args:
        encoder: encoder with a text tower.
        labels: a list for all categories, or a list for each category.
        templates: texts with one `{}` for the label; their embeddings are averaged.
    """

    SETTINGS = ("labels", "templates")

    def __init__(
        self,
        encoder: Encoder | None = None,
        labels: Mapping[str, Sequence[str]] | Sequence[str] = (),
        templates: Sequence[str] = ("a photo of a {}",),
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)

        def to_list(texts: Sequence[str]) -> list[str]:  # because a configuration library passes its own containers
            if isinstance(texts, str):
                raise ValueError(f"expected a list of labels and of templates for {self.name}, got the text {texts!r}")
            return [str(text) for text in texts]

        self.labels: dict[str, list[str]] | list[str]
        if isinstance(labels, Mapping):
            self.labels = {str(category): to_list(texts) for category, texts in labels.items()}
        else:
            self.labels = to_list(labels)
        self.templates = to_list(templates)
        self._embedded: dict[str, torch.Tensor] = {}

    def labels_of(self, category: str) -> list[str] | None:
        """Return the labels of a category; None if it has no labels."""
        return self.labels.get(category) if isinstance(self.labels, dict) else self.labels

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        category = images.rows[positions[0]].category
        if (labels := self.labels_of(category)) is None:
            raise ValueError(f"expected labels of {category!r} for {self.name}, got those of {sorted(self.labels)}")
        if category not in self._embedded:
            self._embedded[category] = label_embeddings(self.encoder, labels, self.templates)
        return self.encoder.of(images, positions), self._embedded[category]


class AttributeEntropy(Attributes):
    """Mean over categories of the entropy (nats) of the zero-shot labels, pooled over the groups of a category.

    Categories without labels, or with fewer images than `minimum_images`, are left out; the document lists them.
    `update` takes images of one category, [N, D], and the embeddings of its labels, [L, D].

    Args:
        encoder, labels, templates: see `Attributes`.
        miller_madow: correct the bias of few images. The plug-in estimate needs only `MINIMUM_IMAGES` images, and its
            document contains the entropy of each category.
    """

    name = "attribute_entropy"
    version = 2
    higher_is_better = True
    unit = "nats"
    bounds: tuple[float | None, float | None] = (0, None)
    aggregate = "category_entropy"
    score = staticmethod(zero_shot_labels)

    def __init__(self, *arguments: Any, miller_madow: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.miller_madow = miller_madow
        if not miller_madow:
            self.aggregate, self.pooled = "mean", "category"

    def compute(self) -> torch.Tensor:
        """Return the entropy of the labels of all images, in nats, float64 []."""
        counts = self._all("scores").long().bincount().tolist()
        return torch.tensor(entropy(counts, self.miller_madow), dtype=torch.float64)

    def require(self, images: ImageSet) -> None:
        left_out, too_small = self.details(images).values()
        if {row.category for row in images.rows} - {*left_out, *too_small}:
            return
        if too_small and images.withheld:  # the document then has no value
            return
        if too_small:
            per_label = "two images a label, and " if self.miller_madow else ""
            listing = ", ".join(f"{category}: {shortage}" for category, shortage in list(too_small.items())[:10])
            raise ValueError(
                f"expected at least {per_label}{MINIMUM_IMAGES} images in a category for {self.name}, got {listing}; "
                "generate more groups a category, give fewer labels, or leave this metric out"
            )
        raise ValueError(
            f"expected images of the categories {sorted(self.labels)} for {self.name}, got {left_out[:10]}; "
            "give labels for the categories of the images"
        )

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        self.require(images)
        left_out, too_small = self.details(images).values()
        values = []
        for pool, members in images.pools(self.pooled).items():
            category = images.rows[members[0]].category
            if category in left_out or category in too_small:
                continue
            indices, labels = self.score(*self.inputs(images, members)).tolist(), self.labels_of(category) or []
            counts = Counter(labels[index] for index in indices)
            value = images.group_value(pool, members, counts=dict(sorted(counts.items())))
            if not self.miller_madow:
                value["value"] = entropy(list(counts.values()), miller_madow=False)
            values.append(value)
        return values

    def details(self, images: ImageSet) -> dict[str, Any]:
        """List the categories without labels, and those with too few images."""
        left_out, too_small = [], {}
        for category, n in sorted(Counter(row.category for row in images.rows).items()):
            labels = self.labels_of(category)
            if labels is None:
                left_out.append(category)
                continue
            needed = minimum_images(len(labels)) if self.miller_madow else MINIMUM_IMAGES
            if n < needed:
                too_small[category] = f"{n} of {needed} images"
        return {"categories_left_out": left_out, "categories_too_small": too_small}
