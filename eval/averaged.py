"""An encoder averaged over mirror images and shifts, so that neither counts as diversity.

A small encoder tells an image from its mirror image: mirroring half of a group's images raises their mean pairwise
distance as much as a method does. The mean over a set of views that mirroring maps onto itself is the same for both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from eval.encoders import Encoder, Scorer, checked
from eval.weights import WeightsFacts


def shifted(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """Move an image [3, H, W] by whole pixels; the pixels of its edge fill what comes into view."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return image[..., rows[:, None], columns]


def views(image: torch.Tensor, shift: float) -> list[torch.Tensor]:
    """Return the 25 shifts of an image [3, H, W] by -2 to 2 steps along both axes, and their mirror images.

    A further shift changes the mean only by the views at the border of the grid, so a wider grid reacts less. A finer
    one hardly does: on the baseline's images of mini-sdxl, 25 shifts within 6 pixels react to shifts by 5, 8 and 10
    pixels as much as 9 do. A step of 6 pixels does not divide 16, the side of the encoder's patches, so that the
    patches lie on other pixels in every view.

    Args:
        shift: length of a step as a share of the shorter side, in (0, 1).
    """
    pixels = max(1, round(shift * min(image.shape[-2:])))
    offsets = range(-2 * pixels, 2 * pixels + 1, pixels)
    moved = [shifted(image, right, down) for right in offsets for down in offsets]
    return moved + [view.flip(-1) for view in moved]


class AveragedEncoder(Encoder):
    """The mean direction of an encoder's embeddings of 50 `views` of an image.

    Args:
        encoder: gives embeddings of length 1.
        shift: length of a step of the shifts as a share of the shorter side, in (0, 0.25]; the default is 6 of 128
            pixels.
    """

    def __init__(self, encoder: Encoder, shift: float = 3 / 64) -> None:
        if not 0 < shift <= 0.25:
            raise ValueError(f"shift must be in (0, 0.25], got {shift}")
        if not encoder.normalised:
            raise ValueError(f"expected an encoder of embeddings of length 1, got {encoder.name}")
        self.encoder = encoder
        self.shift = float(shift)
        self.name = f"{encoder.name}, averaged over mirror and shifts"
        self.dimension = encoder.dimension

    @property
    def id(self) -> str:
        # Raise the number when `views` changes: embeddings are cached under this name.
        return f"{self.encoder.id}-averaged-3-{self.shift:g}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        # Image by image: 50 views of many large images would not fit into memory.
        means = [self.encoder.embed_images(views(checked(image), self.shift)).mean(dim=0) for image in images]
        return F.normalize(torch.stack(means), dim=-1)

    def prepare(self) -> None:
        self.encoder.prepare()

    def parts(self) -> list[Scorer]:
        return self.encoder.parts()

    def weights(self) -> WeightsFacts:
        return self.encoder.weights()
