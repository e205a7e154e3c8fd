"""The training data: rows of a data folder, its images, and latents with noise."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from training.data import load_table
from training.sources import IMAGE_SIZE

#: How often each version of an image is drawn: as it is, and shifted by up to five pixels.
VARIANT_SHARE = (0.6, 0.4)
VARIANTS = len(VARIANT_SHARE)
#: Mean and deviation of the logit of "noisy" times: half of the times are above 0.7, where the shape is decided.
TIME_MEAN, TIME_SD = 0.9, 1.1


def wait_for(*paths: Path) -> None:
    """Block until other stages have written all the paths."""
    while not all(path.exists() for path in paths):
        time.sleep(0.5)


def draw_times(n: int, device: str | torch.device, kind: str) -> torch.Tensor:
    """Draw training times in (0, 1), 1 being pure noise: [n], "uniform", or "noisy" (logit-normal)."""
    scheme = {"uniform": "none", "noisy": "logit_normal"}[kind]
    return compute_density_for_timestep_sampling(scheme, n, TIME_MEAN, TIME_SD, device=device)


class Rows:
    """Pairs of image and caption; a uniform row is a draw of the training distribution.

    Attributes:
        held_out: one pair, two int64 [R], for each image that no training row shows.
        fixed: the pairs on which losses are measured, at most 256 each of "fixed" (training) rows and "held_out" ones.
    """

    def __init__(self, folder: Path, device: str) -> None:
        arrays = {name: torch.from_numpy(array).to(device) for name, array in np.load(folder / "rows.npz").items()}
        self.image, self.caption = arrays["image"], arrays["caption"]
        held_out = arrays.get("held_image", self.image[:0]), arrays.get("held_caption", self.caption[:0])
        generator, self.fixed = torch.Generator().manual_seed(0), {}
        for name, (image, caption) in (("fixed", (self.image, self.caption)), ("held_out", held_out)):
            row = torch.randperm(len(image), generator=generator)[:256].to(device)
            if len(row):
                self.fixed[name] = image[row], caption[row]

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw images, captions and versions of a random batch: three int64 [n]."""
        row = torch.randint(len(self.image), (n,), device=self.image.device)
        share = torch.tensor(VARIANT_SHARE, device=self.image.device)
        return self.image[row], self.caption[row], share.multinomial(n, replacement=True)


class Images:
    """The artwork on the device, uint8 RGBA [N, 128, 128, 4], and its versions, which never change."""

    def __init__(self, folder: Path, device: str) -> None:
        wait_for(folder / "images.npy")
        self.rgba = torch.from_numpy(np.load(folder / "images.npy")).to(device)
        self.rows = Rows(folder, device)
        self.emoji, _ = load_table(folder)
        shift = torch.randint(-5, 6, (len(self.rgba), VARIANTS, 2), generator=torch.Generator().manual_seed(17))
        shift[:, 0] = 0
        self.shift = shift.to(device)
        self.held_out = torch.tensor([i for i, e in enumerate(self.emoji) if e.held_out])

    def render(self, image: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        """Render images on white: RGB in [-1, 1], float32 [n, 3, 128, 128]."""
        rgba = self.rgba[image].float() / 255
        row = torch.arange(IMAGE_SIZE, device=rgba.device)
        y, x = (row - self.shift[image, variant, axis, None] for axis in (1, 0))
        inside = ((y >= 0) & (y < IMAGE_SIZE))[:, :, None] & ((x >= 0) & (x < IMAGE_SIZE))[:, None]
        y, x = y.clamp(0, IMAGE_SIZE - 1), x.clamp(0, IMAGE_SIZE - 1)
        n = torch.arange(len(rgba), device=rgba.device)[:, None, None]
        shifted = (rgba[n, y[:, :, None], x[:, None]] * inside[..., None]).permute(0, 3, 1, 2)
        return (shifted[:, :3] * shifted[:, 3:] + (1 - shifted[:, 3:])) * 2 - 1


#: Loss of clean latents, noise of the same shape, times [n] in (0, 1) and captions [n]: a scalar.
LatentLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Latents:
    """Rows with latents [N, VARIANTS, ...] in place of images."""

    def __init__(self, rows: Rows, latents: torch.Tensor) -> None:
        self.rows, self.latents = rows, latents

    def draw(self, n: int, times: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw latents, noise, times and captions of a random batch."""
        image, caption, variant = self.rows.draw(n)
        z = self.latents[image, variant].float()
        return z, torch.randn_like(z), draw_times(n, z.device, times), caption

    def measure(self, compute_loss: LatentLoss) -> dict[str, float]:
        """Measure the loss of the fixed rows, at times spread evenly over (0, 1) and with noise that never changes."""
        losses = {}
        for name, (image, caption) in self.rows.fixed.items():
            z = self.latents[image, 0].float()
            generator = torch.Generator(z.device).manual_seed(0)
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            times = (torch.arange(len(z), device=z.device) + 0.5) / len(z)
            losses[name] = float(compute_loss(z, noise, times, caption))
        return losses
