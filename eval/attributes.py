"""Which kinds of the thing asked for are shown, and how evenly? Zero-shot labels and the entropy of their counts.

Labels are the argmax of the cosine to text embeddings, each the normalised mean over prompt templates
(Radford et al. 2021, Sec. 3.1.4). The entropy itself is in `eval.intervals`; its correction does not help where
there are few images for the labels: see `minimum_images`.
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
    """Return how many images an entropy of so many labels needs: two a label, and `MINIMUM_IMAGES`.

    What bias the correction leaves depends on images a label (see docs/metrics.md). It counts the labels to choose
    among, not those seen: who would go by those would refuse just the more diverse set.
    """
    return max(MINIMUM_IMAGES, 2 * labels)


def label_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Embed labels, at least 2, as the normalised mean over templates with one `{}` for the label: float32 [L, D]."""
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError(f"expected at least 2 different labels, got {list(labels)}; entropy needs a choice")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"expected templates with one {{}} for the label, got {wrong or 'none'}; 'a photo of a {{}}'")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = encoder.embed_texts(texts).reshape(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(dim=1), dim=-1)


def zero_shot_labels(image_embeddings: torch.Tensor, label_embeddings: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest label of each image: [N, D], [L, D] -> int64 [N]; the first at a tie."""
    return (F.normalize(image_embeddings, dim=-1) @ F.normalize(label_embeddings, dim=-1).T).argmax(dim=-1)


class Attributes(Metric):
    """Something of the labels that images get; `update` takes their embeddings, [..., D], and those of labels, [L, D].

    Args:
        encoder: one with a text tower.
        labels: for each category its own, or one list for all.
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
        for given in (templates, labels, *(labels.values() if isinstance(labels, Mapping) else ())):
            if isinstance(given, str):
                raise ValueError(f"expected a list of labels and of templates for {self.name}, got the text {given!r}")
        # plain containers, whatever a configuration library hands over
        several = isinstance(labels, Mapping)
        self.labels = {str(key): [*map(str, labels[key])] for key in labels} if several else [*map(str, labels)]
        self.templates = [*map(str, templates)]
        self._embedded: dict[str, torch.Tensor] = {}

    def labels_of(self, category: str) -> list[str] | None:
        """Return the labels that images of a category may get; None where it is not named."""
        return self.labels.get(category) if isinstance(self.labels, dict) else self.labels

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[Any, ...]:
        category = images.rows[positions[0]].category
        if (labels := self.labels_of(category)) is None:
            raise ValueError(f"expected labels of {category!r} for {self.name}, got those of {sorted(self.labels)}")
        if category not in self._embedded:
            self._embedded[category] = label_embeddings(self.encoder, labels, self.templates)
        return self.encoder.of(images, positions), self._embedded[category]


class AttributeEntropy(Attributes):
    """Entropy of zero-shot labels, pooled over the groups of a category, mean over categories.

    A category with fewer images than `minimum_images` of its labels is left out, by its number of images alone and so
    the same for every method; the document lists it. `update` takes images of one category, [N, D], and the embeddings
    of its labels, [L, D].

    Args:
        encoder: one with a text tower.
        labels: for each category its own, or one list for all. Images of a category that is not named are left out.
        templates: texts with one `{}` for the label; their embeddings are averaged.
        miller_madow: correct the bias of few images. The plain estimate needs `MINIMUM_IMAGES` alone, and its document
            has the entropy of each category.
    """

    name = "attribute_entropy"
    version = 2
    higher_is_better = True
    unit = "nats"
    bounds = (0, None)
    description = "mean over categories of the entropy (Miller-Madow, nats) of the pooled zero-shot labels"
    aggregate = "category_entropy"
    score = staticmethod(zero_shot_labels)

    def __init__(
        self,
        encoder: Encoder | None = None,
        labels: Mapping[str, Sequence[str]] | Sequence[str] = (),
        templates: Sequence[str] = ("a photo of a {}",),
        miller_madow: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(encoder, labels, templates, **options)
        self.miller_madow = miller_madow
        if not miller_madow:  # which tells the documents of the two apart, too
            self.aggregate, self.pooled = "mean", "category"
            self.description = self.description.replace("Miller-Madow", "plug-in")

    def compute(self) -> torch.Tensor:
        """Return the entropy of all labels, in nats, float64 []."""
        chosen = self._all("scores").long()
        return torch.tensor(entropy(chosen.bincount().tolist(), self.miller_madow), dtype=torch.float64)

    def require(self, images: ImageSet) -> None:
        left_out, too_small = self.details(images).values()
        if {row.category for row in images.rows} - {*left_out, *too_small}:
            return
        if too_small and images.withheld:  # of nothing, if need be
            return
        if too_small:
            raise ValueError(
                f"expected at least {'two images a label, and ' * self.miller_madow}{MINIMUM_IMAGES} images in a "
                f"category for {self.name}, got "
                f"{', '.join(f'{name}: {found}' for name, found in list(too_small.items())[:10])}; generate more "
                "groups a category, give fewer labels, or leave this metric out"
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
            chosen = self.score(*self.inputs(images, members))
            counts = Counter(self.labels_of(category)[index] for index in chosen.tolist())
            found = {} if self.miller_madow else {"value": entropy(list(counts.values()), miller_madow=False)}
            values.append(images.group_value(pool, members, counts=dict(sorted(counts.items())), **found))
        return values

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say which categories are left out for want of labels, and which for want of images: how many of how many."""
        left_out, too_small = [], {}
        for category, n in sorted(Counter(row.category for row in images.rows).items()):
            if (labels := self.labels_of(category)) is None:
                left_out.append(category)
            elif n < (needed := minimum_images(len(labels)) if self.miller_madow else MINIMUM_IMAGES):
                too_small[category] = f"{n} of {needed} images"
        return {"categories_left_out": left_out, "categories_too_small": too_small}
