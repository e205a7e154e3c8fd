"""CADS: its formula, number by number, and what a denoiser is really given."""

import math

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.cads import CADS, anneal, share_of_prompt
from experiments.methods.method import sample
from experiments.methods.steps import denoiser_calls


def naive(y, n, gamma, scale, mixing, rescale):
    """The paper's formulas of one embedding [L, C], with Python's numbers."""
    noised = [[math.sqrt(gamma) * a + scale * math.sqrt(1 - gamma) * b for a, b in zip(*rows, strict=True)]
              for rows in zip(y.tolist(), n.tolist(), strict=True)]  # fmt: skip

    def statistics(values):
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def rescaled(before, after):
        (mean, std), (own_mean, own_std) = statistics(before), statistics(after)
        return [mixing * ((a - own_mean) / own_std * std + mean) + (1 - mixing) * a for a in after]

    if rescale == "token":
        noised = [rescaled(before, after) for before, after in zip(y.tolist(), noised, strict=True)]
    elif rescale == "sample":
        flat = rescaled(y.flatten().tolist(), [value for row in noised for value in row])
        noised = [flat[i : i + y.shape[1]] for i in range(0, len(flat), y.shape[1])]
    return torch.tensor(noised)


@pytest.mark.parametrize("rescale", ["sample", "token", "none"])
def test_the_formula(rescale):
    y, n = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    annealed = anneal(2 * y + 1, n, 0.3, 0.7, 0.8, rescale)
    for i in range(3):
        assert torch.allclose(annealed[i], naive(2 * y[i] + 1, n[i], 0.3, 0.7, 0.8, rescale), atol=1e-5)
    half = anneal((2 * y + 1).bfloat16(), n, 0.3, 0.7, 0.8, rescale)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), annealed, atol=0.1)
    if rescale == "sample":  # with nothing left of the prompt, the noise's scale has no effect
        assert torch.allclose(anneal(y, n, 0, 0.1, 1, rescale), anneal(y, n, 0, 2.0, 1, rescale), atol=1e-5)


def test_the_schedule():
    assert [share_of_prompt(t, 0.6, 0.9) for t in (0, 0.6, 0.9, 1)] == [1, 1, 0, 0]
    assert share_of_prompt(0.7, 0.6, 0.9) == pytest.approx(2 / 3)
    assert [share_of_prompt(t, 0.5, 0.5) for t in (0.5, 0.51)] == [1, 0]


def inputs_of(pipe, kind, method):
    """Return the denoiser's inputs in each call: the timestep, and embeddings by name."""
    seen = []

    def before(call, arguments):
        seen.append((call.timestep, dict(call.prompts)))
        return arguments

    # Hooks that are registered later see what earlier ones made of the arguments.
    with method.apply(pipe, PAIR, CALLS[kind]), denoiser_calls(pipe, before):
        sample(pipe, PAIR, CALLS[kind] | {"num_inference_steps": 4})
    return seen


@pytest.mark.parametrize("halves", ["conditional", "both"])
def test_what_the_denoiser_is_given(pipe, kind, halves):
    unchanged = inputs_of(pipe, kind, CADS("m", noise_scale=0))
    noised = inputs_of(pipe, kind, CADS("m", noise_scale=0.5, tau1=0.3, tau2=0.8, mixing=0, halves=halves))
    assert len(unchanged[0][1]) == 2, "tokens and pooled"
    gammas = [share_of_prompt(t / 1000, 0.3, 0.8) for t, _ in unchanged]
    assert 1 in gammas and min(gammas) < 1
    noises = []
    for gamma, (_, before), (_, after) in zip(gammas, unchanged, noised, strict=True):
        for name, y in before.items():
            if gamma == 1:
                assert torch.equal(after[name], y)
                continue
            noise = (after[name] - math.sqrt(gamma) * y) / (0.5 * math.sqrt(1 - gamma))
            if kind == "sdxl":
                assert torch.equal(after[name][:2], y[:2]) == (halves == "conditional")
            noises += list(noise[-2:]) + (list(noise[:2]) if halves == "both" and kind == "sdxl" else [])
    for i, one in enumerate(noises):
        assert abs(one.mean()) < 6 / math.sqrt(one.numel()) and abs(one.std() - 1) < 6 / math.sqrt(one.numel())
        assert all(not torch.allclose(one, other, atol=1e-2) for other in noises[:i] if other.shape == one.shape)
