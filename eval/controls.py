"""Negative controls: edits of existing images that add no diversity, or that destroy quality.

A measure of diversity that rises for mirrored or shifted images counts them as other images, and a measure of quality
that does not fall for blurred or noisy images does not see them. Neither is fit to decide between methods.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.transforms.functional import gaussian_blur

from eval.averaged import shifted
from eval.images import UNKNOWN_SEED
from eval.imageset import ImageSet


def mirror_half(image: torch.Tensor, index: int, seed: int) -> torch.Tensor:
    """Mirror every second image of a group."""
    return image.flip(-1) if index % 2 else image


def shift_half(image: torch.Tensor, index: int, seed: int) -> torch.Tensor:
    """Move every second image of a group to the right by a sixteenth of its width."""
    return shifted(image, round(image.shape[-1] / 16), 0) if index % 2 else image


def blur(image: torch.Tensor, index: int, seed: int) -> torch.Tensor:
    """Blur an image with a Gaussian whose sigma is 3/128 of the shorter side."""
    sigma = 3 / 128 * min(image.shape[-2:])
    return gaussian_blur(image, 2 * round(4 * sigma) + 1, sigma)


def add_noise(image: torch.Tensor, index: int, seed: int) -> torch.Tensor:
    """Add Gaussian noise with a standard deviation of a tenth of the range."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + 25.5 * noise).round().clamp(0, 255).to(torch.uint8)


#: Name -> edit of an image, uint8 [3, H, W], given its index in the group and a seed for random numbers.
CONTROLS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "mirrored": mirror_half,
    "shifted": shift_half,
    "blurred": blur,
    "noisy": add_noise,
}


def write_control(images: ImageSet, name: str, folder: Path) -> ImageSet:
    """Write a control of every image as PNG into a folder, and return the set: groups and prompts are the same.

    Raises:
        OSError: the folder cannot be written.
    """
    edit, rows = CONTROLS[name], list(images.rows)
    folder.mkdir(parents=True, exist_ok=True)
    for members in images.groups.values():
        for index, position in enumerate(members):
            file = f"{position:06d}.png"
            (image,) = images.load([position])
            row = images.rows[position]
            seed = position if row.seed == UNKNOWN_SEED else row.seed
            write_png(edit(image, index, seed), str(folder / file), compression_level=1)
            rows[position] = replace(row, path=file, sha256=None)
    return replace(images, folder=folder, rows=rows)
