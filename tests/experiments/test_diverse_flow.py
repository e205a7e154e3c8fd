"""DiverseFlow: the gradient of its likelihood, and the predictions that a pipeline goes on with."""

import math

import pytest
import torch
from scipy.stats import chi2
from test_methods import CALLS

from experiments.methods.diverse_flow import DiverseFlow, noise_quality, process_gradient
from experiments.methods.method import sample
from experiments.methods.steps import predictions
from experiments.prompts import Group

THREE = Group("one", "a red thing", "red", 0, 3)


def likelihood(x, quality, spread):
    """Return log(det L / det(L + I)) of one group [K, N], from the definition; the median is a constant."""
    squares = ((x[:, None] - x[None]) ** 2).sum(dim=2)
    pairs = sorted(squares[i, j].item() for i in range(len(x)) for j in range(i))
    middle = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
    kernel = torch.exp(-spread * squares / (2 * middle)) * quality[:, None] * quality[None]
    return torch.logdet(kernel) - torch.logdet(kernel + torch.eye(len(x), dtype=x.dtype))


def naive(x, quality, spread):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(likelihood(x, quality, spread), x)[0]


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_gradient_is_that_of_the_likelihood(K, scale):
    generator = torch.Generator().manual_seed(K)
    groups = 3 * torch.randn(2, K, 8, generator=generator, dtype=torch.float64)
    quality = scale * (0.1 + 0.9 * torch.rand(2, K, generator=generator, dtype=torch.float64))
    expected = torch.stack([naive(*group, 1.3) for group in zip(groups, quality, strict=True)])
    assert torch.allclose(process_gradient(groups, quality, 1.3), expected, rtol=1e-8)


def test_equal_images_have_a_finite_gradient():
    one = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    alike = one.expand(1, 3, 8)
    assert torch.equal(process_gradient(alike, torch.ones(1, 3), 9.0), torch.zeros(1, 3, 8))
    two_alike = torch.cat([alike[:, :2], -one], dim=1)
    assert process_gradient(two_alike, torch.ones(1, 3), 1.0).isfinite().all()


def test_the_quality_of_unlikely_noise_falls_to_its_least_value():
    radius = math.sqrt(chi2.ppf(0.95, 50))
    direction = torch.nn.functional.normalize(torch.ones(50), dim=0)
    lengths = torch.tensor([0.0, radius - 0.01, math.sqrt(radius**2 + 0.5), 2 * radius])
    expected = torch.tensor([1.0, 1.0, math.exp(-0.5), 0.01])
    assert torch.allclose(noise_quality(lengths[:, None] * direction, 0.95, 0.01), expected, atol=1e-4)
    assert torch.equal(noise_quality(100 * torch.ones(2, 50), 1.0, 0.01), torch.ones(2))


@pytest.mark.parametrize("steps", [2, 4])
def test_predictions_climb_the_likelihood_by_the_declared_length(pipe, kind, steps):
    before, after = [], []
    call = CALLS[kind] | {"num_inference_steps": steps}
    method = DiverseFlow("m", dpp_scale=0.3, spread=2.0)
    watched = predictions(pipe, lambda p: after.append(p.clean) or p.clean)
    with watched, method.apply(pipe, THREE, call), predictions(pipe, lambda p: before.append(p) or p.clean):
        sample(pipe, THREE, call)
    assert len(before) == steps
    for one, changed in zip(before, after, strict=True):
        x, t = one.clean.flatten(1).double(), one.noise / (one.signal + one.noise)
        noise = ((one.sample - one.signal * one.clean) / one.noise).flatten(1).double()
        outside = noise.square().sum(dim=1) - chi2.ppf(0.95, noise.shape[1])
        quality = torch.exp(-outside.clamp(min=0)).clamp(min=0.01)
        gradient = naive(x, quality, 2.0)
        moved = 0.3 * t**2 * (noise - x).norm() * gradient / gradient.norm()
        assert torch.allclose(changed.flatten(1).double() - x, moved, rtol=1e-2, atol=1e-3 * moved.abs().max().item())
