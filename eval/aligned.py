"""A pairwise distance that neither mirror images nor shifts raise.

An encoder tells an image from its mirror image and from its shifted copy: editing half of a group's images so raises
their mean pairwise distance as much as a method does. Here each image is embedded in many shifts. The distance of two
images is that of the two shifts in which they are most alike. A mean over shifts reacts to a shift all the same, by the
views at the border of the grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from eval.averaged import ViewsEncoder, views
from eval.encoders import Encoder, checked, unit_vectors
from eval.metric import Metric

#: Number of steps to either side, along both axes.
STEPS = 2
#: Length of a step as a share of the shorter side: 6 of 128 pixels, which does not divide 16, the side of mini-clip's
#: patches, so that the patches lie on other pixels in every view.
STEP = 3 / 64
#: Number of shifts of an image.
SHIFTS = (2 * STEPS + 1) ** 2


class ShiftsEncoder(ViewsEncoder):
    """The embeddings of 25 shifts of an image in one vector of length 1.

    The embedding of a shift is the mean direction of the shifted image and of its mirror image, of length 1 / 5.

    Args:
        encoder: gives embeddings of length 1.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.name = f"{encoder.name}, {SHIFTS} shifts"
        self.dimension = None if encoder.dimension is None else SHIFTS * encoder.dimension

    @property
    def id(self) -> str:
        # Raise the number when the shifts change: embeddings are cached under this name.
        return f"{self.encoder.id}-shifts-1"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        # Image by image: 50 views of many large images would not fit into memory.
        return torch.stack([self._embed(checked(image)) for image in images])

    def _embed(self, image: torch.Tensor) -> torch.Tensor:
        both = self.encoder.embed_images(views(image, STEP, STEPS)).unflatten(0, (2, SHIFTS))
        return F.normalize(both.mean(dim=0), dim=-1).flatten() / SHIFTS**0.5


class AlignedDistance(Metric):
    """Mean over the pairs of images of a group of 1 - the largest cosine of a shift of one and a shift of the other.

    `update` takes groups of embeddings of a `ShiftsEncoder`, [..., K, SHIFTS D], K >= 2.

    Args:
        encoder: embeds a view of an image; embeddings have length 1.
    """

    name = "pairwise_distance_aligned"
    higher_is_better = True
    unit = "1 - cosine, 0 to 2"
    bounds = (0, 2)
    minimum = 2

    def __init__(self, encoder: Encoder | None = None, **options: Any) -> None:
        super().__init__(None if encoder is None else ShiftsEncoder(encoder), **options)

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        shifts = unit_vectors(embeddings.unflatten(-1, (SHIFTS, -1)))
        k = shifts.shape[-3]
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        largest = [(shifts[..., i, :, :] @ shifts[..., j, :, :].mT).amax(dim=(-2, -1)) for i, j in pairs]
        return 1 - torch.stack(largest, dim=-1).mean(dim=-1)
