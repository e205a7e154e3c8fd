"""Pink noise: initial latents with more low frequencies, so that layouts differ more than from white noise."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import initial_noise
from experiments.prompts import Group
from negtome.validation import check_float


def coloured(noise: torch.Tensor, exponent: float) -> torch.Tensor:
    """Filter white noise [rows, c, h, w] to a power spectrum of f^-exponent with unit variance.

    The frequency f is in cycles a pixel; the mean is treated as the lowest other frequency. The gain depends only on
    the shape, so that normal noise stays normal, with unit variance on average.
    """
    height, width = noise.shape[-2:]
    vertical = torch.fft.fftfreq(height, device=noise.device)[:, None]
    horizontal = torch.fft.fftfreq(width, device=noise.device)
    gain = torch.hypot(vertical, horizontal).clamp(min=1 / max(height, width)) ** (-exponent / 2)  # [h, w]
    spectrum = torch.fft.fft2(noise.float()) * (gain / gain.square().mean().sqrt())
    return torch.fft.ifft2(spectrum).real.to(noise.dtype)


@dataclass
class PinkNoise(Method):
    """Pink instead of white noise as initial latents, as in "It's Never Too Late" (arXiv 2601.00090).

    The Fourier amplitude of each channel at frequency f is multiplied by f^(-exponent / 2), and all amplitudes by one
    number that restores unit variance. The paper also optimises the noise, which is not done here.

    Attributes:
        exponent: a of the power spectrum f^-a: 0 is white, and off; 0.2 is published, 1 is pink in the strict sense; a
            negative one prefers high frequencies.
    """

    title = "pink noise"
    columns = numbers("exponent")
    version = 1

    name: str
    exponent: float = 0.2

    def __post_init__(self) -> None:
        self.exponent = check_float("method.exponent", self.exponent, -math.inf, math.inf)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        with initial_noise(pipe, lambda noise: coloured(noise, self.exponent) if self.exponent else noise):
            yield MethodContext(dict(call))
