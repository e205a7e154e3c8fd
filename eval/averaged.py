"""An encoder averaged over mirror images and shifts, so that neither counts as diversity.

A small encoder tells an image from its mirror image: mirroring half of a group's images raises their mean pairwise
distance as much as a method does. The mean over a set of views that mirroring maps onto itself is the same for both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from eval.encoders import Encoder, Scorer, checked
from eval.weights import WeightsFacts

#: Images whose views are embedded together: as many as an image set embeds at once.
IMAGES_AT_ONCE = 32


def shifted(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """Move an image [3, H, W] by whole pixels; the pixels of its edge fill what comes into view."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return image[..., rows[:, None], columns]


def views(image: torch.Tensor, step: float, steps: int = 1) -> list[torch.Tensor]:
    """Return the shifts of an image [3, H, W] by -steps to `steps` steps along both axes, and their mirror images.

    Args:
        step: length of a step as a share of the shorter side, in (0, 1); at least one pixel is used.
        steps: number of steps to either side, at least 1.

    Returns:
        2 (2 steps + 1)^2 images, the mirror images last and in the same order.
    """
    pixels = max(1, round(step * min(image.shape[-2:])))
    offsets = range(-steps * pixels, steps * pixels + 1, pixels)
    moved = [shifted(image, right, down) for right in offsets for down in offsets]
    return moved + [view.flip(-1) for view in moved]


class ViewsEncoder(Encoder):
    """An encoder that embeds several views of an image by another encoder; a subclass puts them together.

    Args:
        encoder: gives embeddings of length 1.

    Raises:
        ValueError: embeddings of `encoder` have other lengths.
    """

    def __init__(self, encoder: Encoder) -> None:
        if not encoder.normalised:
            raise ValueError(f"expected an encoder of embeddings of length 1, got {encoder.name}")
        self.encoder = encoder

    def prepare(self) -> None:
        self.encoder.prepare()

    def parts(self) -> list[Scorer]:
        return self.encoder.parts()

    def weights(self) -> WeightsFacts:
        return self.encoder.weights()


class AveragedEncoder(ViewsEncoder):
    """The mean direction of an encoder's embeddings of 18 `views` of an image.

    Args:
        encoder: gives embeddings of length 1.
        shift: length of the shifts as a share of the shorter side, in (0, 0.5]; the default is 6 of 128 pixels.
    """

    def __init__(self, encoder: Encoder, shift: float = 3 / 64) -> None:
        super().__init__(encoder)
        if not 0 < shift <= 0.5:
            raise ValueError(f"shift must be in (0, 0.5], got {shift}")
        self.shift = float(shift)
        self.name = f"{encoder.name}, averaged over mirror and shifts"
        self.dimension = encoder.dimension

    @property
    def id(self) -> str:
        # Raise the number when `views` changes: embeddings are cached under this name.
        return f"{self.encoder.id}-averaged-2-{self.shift:g}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        # A folder's images with all their views at once may take gigabytes.
        parts = [images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE)]
        return torch.cat([self._embed(part) for part in parts])

    def _embed(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        every = [view for image in images for view in views(checked(image), self.shift)]
        embeddings = self.encoder.embed_images(every).unflatten(0, (len(images), -1))
        return F.normalize(embeddings.mean(dim=1), dim=-1)
