"""CADS: its formula, number by number, and the embeddings that a denoiser receives."""

import itertools
import math
import statistics

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.cads import CADS, anneal, share_of_prompt
from experiments.methods.method import sample
from experiments.methods.steps import denoiser_calls


def naive(y, n, gamma, scale, mixing, rescale):
    """Apply the paper's formulas to lists of numbers, which are rescaled together."""
    noised = [math.sqrt(gamma) * a + scale * math.sqrt(1 - gamma) * b for a, b in zip(y, n, strict=True)]
    if rescale == "none":
        return noised
    mean, std = statistics.mean(y), statistics.stdev(y)
    noised_mean, noised_std = statistics.mean(noised), statistics.stdev(noised)
    return [mixing * ((a - noised_mean) / noised_std * std + mean) + (1 - mixing) * a for a in noised]


@pytest.mark.parametrize("rescale", ["sample", "token", "none"])
def test_the_formula(rescale):
    y, n = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    annealed = anneal(2 * y + 1, n, 0.3, 0.7, 0.8, rescale)
    size = 20 if rescale == "sample" else 5
    parts = zip((2 * y + 1).view(-1, size).tolist(), n.view(-1, size).tolist(), strict=True)
    expected = torch.tensor([naive(*part, 0.3, 0.7, 0.8, rescale) for part in parts]).view_as(y)
    assert torch.allclose(annealed, expected, atol=1e-5)
    half = anneal((2 * y + 1).bfloat16(), n, 0.3, 0.7, 0.8, rescale)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), annealed, atol=0.1)
    if rescale == "sample":  # without any of the prompt, the noise's scale has no effect
        assert torch.allclose(anneal(y, n, 0, 0.1, 1, rescale), anneal(y, n, 0, 2.0, 1, rescale), atol=1e-5)


def test_the_schedule():
    assert [share_of_prompt(t, 0.6, 0.9) for t in (0, 0.6, 0.9, 1)] == [1, 1, 0, 0]
    assert share_of_prompt(0.7, 0.6, 0.9) == pytest.approx(2 / 3)
    assert [share_of_prompt(t, 0.5, 0.5) for t in (0.5, 0.51)] == [1, 0]


def embeddings_of(pipe, kind, method):
    """Return the timestep and the embeddings by name of each call of the denoiser."""
    calls = []

    def before(call, arguments):
        calls.append((call.timestep, dict(call.prompts)))
        return arguments

    # Hooks that are registered later see what earlier ones made of the arguments.
    with method.apply(pipe, PAIR, CALLS[kind]), denoiser_calls(pipe, before):
        sample(pipe, PAIR, CALLS[kind] | {"num_inference_steps": 4})
    return calls


@pytest.mark.parametrize("halves", ["conditional", "both"])
def test_the_denoiser_receives_noise_of_unit_variance_that_differs_everywhere(pipe, kind, halves):
    unchanged = embeddings_of(pipe, kind, CADS("m", noise_scale=0))
    noised = embeddings_of(pipe, kind, CADS("m", noise_scale=0.5, tau1=0.3, tau2=0.8, mixing=0, halves=halves))
    assert len(unchanged[0][1]) == 2, "tokens and pooled"
    gammas = [share_of_prompt(t / 1000, 0.3, 0.8) for t, _ in unchanged]
    assert 1 in gammas and min(gammas) < 1
    samples = []
    for gamma, (_, before), (_, after) in zip(gammas, unchanged, noised, strict=True):
        for name, y in before.items():
            if gamma == 1:
                assert torch.equal(after[name], y)
                continue
            noise = (after[name] - math.sqrt(gamma) * y) / (0.5 * math.sqrt(1 - gamma))
            samples += list(noise[-2:])
            if kind == "sdxl":
                assert torch.equal(after[name][:2], y[:2]) == (halves == "conditional")
                samples += list(noise[:2]) if halves == "both" else []
    for one in samples:
        assert abs(one.mean()) < 6 / math.sqrt(one.numel()) and abs(one.std() - 1) < 6 / math.sqrt(one.numel())
    for one, other in itertools.combinations(samples, 2):
        assert one.shape != other.shape or not torch.allclose(one, other, atol=1e-2)
