"""Pink noise: its spectrum by the sums of a Fourier transform, its variance, and that sampling begins from it."""

import cmath
import itertools
import math

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.method import sample
from experiments.methods.pink_noise import PinkNoise, coloured
from experiments.methods.steps import initial_noise


def naive(noise, exponent):
    """Filter one channel [h, w] by sums over all pixels and frequencies."""
    height, width = noise.shape
    positions = list(itertools.product(range(height), range(width)))

    def transform(values, sign):
        sums = {}
        for v, u in positions:
            waves = [cmath.exp(sign * 2j * math.pi * (v * y / height + u * x / width)) for y, x in positions]
            sums[v, u] = sum(values[place] * wave for place, wave in zip(positions, waves, strict=True))
        return sums

    gains = {}
    for v, u in positions:  # frequencies beyond a half are negative ones
        f = math.hypot(min(v, height - v) / height, min(u, width - u) / width) or 1 / max(height, width)
        gains[v, u] = f ** (-exponent / 2)
    norm = math.sqrt(sum(gain**2 for gain in gains.values()) / len(gains))
    spectrum = transform({place: float(noise[place]) for place in positions}, -1)
    filtered = transform({place: gains[place] / norm * spectrum[place] / len(positions) for place in positions}, 1)
    assert max(abs(value.imag) for value in filtered.values()) < 1e-9
    return torch.tensor([filtered[place].real for place in positions]).view(height, width)


@pytest.mark.parametrize(("height", "width", "exponent"), [(4, 6, 0.2), (5, 4, 1.0), (4, 4, -0.7)])
def test_the_filter(height, width, exponent):
    noise = torch.randn(2, 2, height, width, generator=torch.Generator().manual_seed(0))
    filtered = coloured(noise, exponent)
    for channel, white in zip(filtered.flatten(0, 1), noise.flatten(0, 1), strict=True):
        assert torch.allclose(channel, naive(white, exponent), atol=1e-5)
    assert coloured(noise.half(), exponent).dtype == torch.float16


def test_its_spectrum_falls_and_its_variance_stays():
    noise = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pink = coloured(noise, 1.0)
    assert float(pink.var()) == pytest.approx(1, abs=0.03)
    gain = (torch.fft.fft2(pink) / torch.fft.fft2(noise)).abs().square().median(dim=0).values.median(dim=0).values
    ratios = [gain[0, 1] / gain[0, 4], gain[2, 0] / gain[8, 0], gain[0, 0] / gain[0, 1]]
    # It falls as 1 / f, and the mean has the gain of the lowest other frequency.
    assert [float(ratio) for ratio in ratios] == pytest.approx([4, 4, 1], rel=1e-3)
    assert torch.allclose(coloured(noise, 0.0), noise, atol=1e-5)


def test_sampling_begins_from_it(pipe, kind):
    white, pink = [], []
    with initial_noise(pipe, lambda noise: white.append(noise) or noise):
        sample(pipe, PAIR, CALLS[kind])
    watched = initial_noise(pipe, lambda noise: pink.append(noise) or noise)
    with PinkNoise("m", 0.8).apply(pipe, PAIR, CALLS[kind]) as context, watched:
        sample(pipe, PAIR, context.call)
    assert torch.allclose(pink[0], coloured(white[0], 0.8), atol=1e-5)
    assert not torch.allclose(pink[0], white[0], atol=0.1)
