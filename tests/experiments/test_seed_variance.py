"""Seed variance enhancer: its formula, number by number, and the embeddings that a denoiser receives."""

import math
import statistics

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.method import sample
from experiments.methods.seed_variance import SeedVariance, disturb
from experiments.methods.steps import denoiser_calls


def naive(row, noise, chosen, strength, relative):
    """Apply the formula to one image's tokens, lists of lists of numbers."""
    texts = [token for token in row if any(token)]
    unit = statistics.pstdev(number for token in texts for number in token) if relative else 1
    return [
        [a + strength * unit * u * m * any(token) for a, u, m in zip(token, us, ms, strict=True)]
        for token, us, ms in zip(row, noise, chosen, strict=True)
    ]


@pytest.mark.parametrize("relative", [True, False])
def test_the_formula(relative):
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(2, 5, 6, generator=generator) + 1
    tokens[1, 3:] = 0  # padding
    noise = 2 * torch.rand(2, 5, 6, generator=generator) - 1
    chosen = torch.rand(2, 5, 6, generator=generator) < 0.5
    rows = zip(tokens.tolist(), noise.tolist(), chosen.tolist(), strict=True)
    expected = torch.tensor([naive(*row, 1.5, relative) for row in rows])
    assert torch.allclose(disturb(tokens, noise, chosen, 1.5, relative), expected, atol=1e-5)
    half = disturb(tokens.half(), noise, chosen, 1e6, relative)
    assert half.dtype == torch.float16 and half.isfinite().all(), "more than a half holds is the largest that it holds"
    assert not disturb(torch.zeros(1, 5, 6), noise[:1], chosen[:1], 1.5, relative).any(), "padding alone stays"


def tokens_of(pipe, kind, method, steps):
    """Return the embeddings by name of each call of the denoiser."""
    calls = []
    with (
        method.apply(pipe, PAIR, CALLS[kind]),
        denoiser_calls(pipe, lambda call, arguments: calls.append(dict(call.prompts)) or arguments),
    ):
        sample(pipe, PAIR, CALLS[kind] | {"num_inference_steps": steps})
    return calls


@pytest.mark.parametrize(
    ("steps", "early_share", "early"),
    [(4, 0.2, 1), (5, 0.4, 2), (3, 1.0, 3), (1, 0.2, 1), pytest.param(25, 0.28, 7, marks=pytest.mark.slow)],
)
def test_the_denoiser_gets_one_noise_an_image_in_the_first_steps_alone(pipe, kind, steps, early_share, early):
    unchanged = tokens_of(pipe, kind, SeedVariance("m", strength=0), steps)
    noised = tokens_of(pipe, kind, SeedVariance("m", strength=0.5, relative=False, early_share=early_share), steps)
    early_noise = []
    for number, (before, after) in enumerate(zip(unchanged, noised, strict=True)):
        tokens, pooled = before
        assert torch.equal(after[pooled], before[pooled])
        noise = after[tokens] - before[tokens]
        if number >= early:
            assert not noise.any()
            continue
        assert kind == "flux" or not noise[:2].any(), "the unconditional half stays"
        early_noise.append(noise[-2:])
    assert len(early_noise) == early
    assert all(torch.equal(noise, early_noise[0]) for noise in early_noise)
    one, other = early_noise[0]
    assert not torch.equal(one, other)
    for noise in (one, other):
        assert noise.abs().max() <= 0.5 + 1e-5
        assert abs((noise != 0).float().mean() - 0.5) < 3 / math.sqrt(noise.numel())
        # Half of the numbers have the variance of a uniform distribution.
        assert noise.square().mean() == pytest.approx(0.5 * 0.5**2 / 3, rel=0.3)
