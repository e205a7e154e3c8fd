"""Particle guidance: its gradient, written out pair by pair, and the predictions that a pipeline goes on with."""

import math
import statistics

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.method import sample
from experiments.methods.particle_guidance import ParticleGuidance, repulsion
from experiments.methods.steps import predictions
from experiments.prompts import Group

FOUR = Group("one", "a red thing", "red", 0, 4)


def naive(particles, bandwidth):
    """Return minus the gradient of each particle's sum of kernels to the others, of latents [K, N]."""
    K, gradients = len(particles), []
    distances = torch.cdist(particles, particles).tolist()
    for i, x in enumerate(particles.clone().requires_grad_()):
        if bandwidth == "paper":
            h = statistics.median(distances[j][k] for j in range(K) for k in range(j)) ** 2 / math.log(K)
        else:
            h = statistics.median_low(distances[i][j] for j in range(K) if j != i) ** 2 / math.log(K - 1)
        potential = sum(torch.exp(-((x - particles[j]) ** 2).sum() / h) for j in range(K) if j != i)
        gradients.append(-torch.autograd.grad(potential, x)[0])
    return torch.stack(gradients)


@pytest.mark.parametrize(
    ("K", "bandwidth"), [(2, "paper"), (3, "paper"), (5, "paper"), (3, "released"), (4, "released")]
)
def test_the_repulsion_is_the_gradient_of_the_kernels(K, bandwidth):
    groups = torch.randn(2, K, 12, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    groups[1] *= 3
    expected = torch.stack([naive(group, bandwidth) for group in groups])
    assert torch.allclose(repulsion(groups, bandwidth), expected, rtol=1e-9)
    assert torch.equal(repulsion(torch.ones(1, 3, 8), bandwidth), torch.zeros(1, 3, 8)), "equal latents stay"


@pytest.mark.parametrize("bandwidth", ["paper", "released"])
def test_predictions_move_while_there_is_more_noise_than_signal(pipe, kind, bandwidth):
    before, after = [], []
    call = CALLS[kind] | {"num_inference_steps": 4}
    method = ParticleGuidance("m", coefficient=5.0, bandwidth=bandwidth, sigma_high=2.0)
    watched = predictions(pipe, lambda p: after.append(p) or p.clean)
    with watched, method.apply(pipe, FOUR, call), predictions(pipe, lambda p: before.append(p) or p.clean):
        sample(pipe, FOUR, call)
    sigmas = [min(one.sigma, 2.0) for one in before]
    assert min(sigmas) < 1 <= max(sigmas)
    for sigma, one, other in zip(sigmas, before, after, strict=True):
        expected = one.clean
        if sigma >= 1:
            particles = one.sample.flatten(1) / math.sqrt(one.signal**2 + one.noise**2)
            expected = one.clean + 5.0 * sigma**2 * naive(particles, bandwidth).view_as(one.clean)
            assert not torch.allclose(other.clean, one.clean, atol=1e-4)
        assert torch.allclose(other.clean, expected, rtol=1e-3, atol=1e-3)


def test_the_released_bandwidth_of_two_is_refused(tiny_sdxl):
    context = ParticleGuidance("m", bandwidth="released").apply(tiny_sdxl, PAIR, CALLS["sdxl"])
    with pytest.raises(ValueError, match=r"0 for a group of n = 2: use bandwidth=paper"), context:
        pass
