"""Particle guidance: the gradient that is written out, and what a pipeline is moved by."""

import math
import statistics

import pytest
import torch
from test_methods import CALLS

from experiments.methods.method import sample
from experiments.methods.particle_guidance import ParticleGuidance, repulsion
from experiments.methods.steps import predictions
from experiments.prompts import Group

FOUR = Group("one", "a red thing", "red", 0, 4)


def by_autograd(particles, bandwidth):
    """Minus the gradient of each particle's sum of kernels to the others, particle by particle, of latents [K, N]."""
    K, found = len(particles), []
    apart = [[math.dist(one.tolist(), other.tolist()) for other in particles] for one in particles]
    for i in range(K):
        if bandwidth == "paper":
            h = statistics.median(apart[j][k] for j in range(K) for k in range(j)) ** 2 / math.log(K)
        else:
            h = statistics.median_low(apart[i][j] for j in range(K) if j != i) ** 2 / math.log(K - 1)
        x = particles[i].clone().requires_grad_()
        potential = sum(torch.exp(-((x - particles[j]) ** 2).sum() / h) for j in range(K) if j != i)
        found.append(-torch.autograd.grad(potential, x)[0])
    return torch.stack(found)


@pytest.mark.parametrize("bandwidth", ["paper", "released"])
@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_the_repulsion_is_the_gradient_of_the_kernels(K, bandwidth):
    if (K, bandwidth) == (2, "released"):
        pytest.skip("refused, which has a test of its own")
    groups = torch.randn(2, K, 12, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    groups[1] *= 3
    naive = torch.stack([by_autograd(group, bandwidth) for group in groups])
    assert torch.allclose(repulsion(groups, bandwidth), naive, rtol=1e-9)


@pytest.mark.parametrize("bandwidth", ["paper", "released"])
def test_equal_latents_have_no_direction_to_part_in(bandwidth):
    assert torch.equal(repulsion(torch.ones(1, 3, 8), bandwidth), torch.zeros(1, 3, 8))


@pytest.mark.parametrize("bandwidth", ["paper", "released"])
def test_what_a_pipeline_predicts_is_moved_by_it_while_there_is_more_noise_than_signal(pipe, kind, bandwidth):
    before, after = [], []
    call = CALLS[kind] | {"num_inference_steps": 4}
    method = ParticleGuidance("m", coefficient=5.0, bandwidth=bandwidth, sigma_high=2.0)
    watched = predictions(pipe, lambda p: after.append(p) or p.clean)
    with watched, method.apply(pipe, FOUR, call), predictions(pipe, lambda p: before.append(p) or p.clean):
        sample(pipe, FOUR, call)
    moved = 0
    for one, other in zip(before, after, strict=True):
        sigma = min(one.noise / one.signal if one.signal else math.inf, 2.0)
        particles = one.sample.flatten(1) / math.sqrt(one.signal**2 + one.noise**2)
        expected = one.clean
        if sigma >= 1:
            expected = one.clean + 5.0 * sigma**2 * by_autograd(particles, bandwidth).view_as(one.clean)
            moved += 1
            assert not torch.allclose(other.clean, one.clean, atol=1e-4)
        assert torch.allclose(other.clean, expected, rtol=1e-3, atol=1e-3)
    assert 0 < moved < len(before)


def test_the_released_bandwidth_of_two_is_refused(tiny_sdxl):
    pair = Group("one", "a red thing", "red", 0, 2)
    with (
        pytest.raises(ValueError, match=r"0 for a group of n = 2: use bandwidth=paper"),
        ParticleGuidance("m", bandwidth="released").apply(tiny_sdxl, pair, CALLS["sdxl"]),
    ):
        pass


@pytest.mark.parametrize(("setting", "value"), [("coefficient", -1), ("bandwidth", "median"), ("sigma_low", "one")])
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"method.{setting} must be"):
        ParticleGuidance("m", **{setting: value})
