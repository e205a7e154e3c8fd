"""Contrastive noise optimisation: the loss, and the resulting initial noise of a pipeline."""

import math

import numpy as np
import pytest
import torch
from test_methods import CALLS, shape_of

from experiments.methods.combined import Combined
from experiments.methods.contrastive_noise import ContrastiveNoise, contrast
from experiments.methods.method import Baseline, sample
from experiments.methods.steps import denoiser_calls, predictions, unpacked
from experiments.prompts import Group
from negtome.sites import find_architecture

GROUP = Group("one", "a red thing", "red", 0, 3)


def naive(latents, first, temperature, gamma, loss):
    """Compute the loss image by image and, as released, position by position."""
    positions = [(latents.flatten(1), first.flatten(1))]
    if loss == "released":
        positions = zip(latents.flatten(2).unbind(2), first.flatten(2).unbind(2), strict=True)
    terms = []
    for images, first_images in positions:
        for i, x in enumerate(images):
            cosines = torch.nn.functional.cosine_similarity(x, images, dim=1)
            held = torch.exp(torch.nn.functional.cosine_similarity(x, first_images[i], dim=0) / (gamma * temperature))
            others = sum(torch.exp(cosine / temperature) for j, cosine in enumerate(cosines) if j != i)
            itself = held if loss == "released" else math.exp(1 / temperature)
            terms.append(-torch.log(held / (itself + others)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_the_loss_is_that_of_every_image_against_every_other(loss):
    latents, first = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(contrast(latents, first, 0.3, 0.8, loss), naive(latents, first, 0.3, 0.8, loss), rtol=1e-9)


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_the_first_step_of_adam_goes_down_the_gradient_of_each_number(pipe, kind, loss):
    """The distance is the learning rate, whatever the gradient's length."""
    inputs, predicted = [], []
    name = find_architecture(pipe).sample
    with predictions(pipe, lambda prediction: predicted.append(prediction.clean) or prediction.clean):
        sample(pipe, GROUP, CALLS[kind])
    with denoiser_calls(pipe, lambda call, arguments: inputs.append(arguments[name][:3]) or arguments):
        ContrastiveNoise("m", inner_steps=1, learning_rate=0.05, window=4, loss=loss).generate(pipe, GROUP, CALLS[kind])
    # The denoiser's input at the first step is the noise: Euler's schedulers scale it to unit variance.
    before, after, x = (unpacked(pipe, latents, 32, 32) for latents in (inputs[0], inputs[1], predicted[0]))
    side = x.requires_grad_().shape[2] // 4
    pooled = x.unflatten(3, (4, side)).unflatten(2, (4, side)).mean(dim=(3, 5))
    gamma = 1 / (0.1 * math.log(2) + 1)  # of three images
    (gradient,) = torch.autograd.grad(naive(pooled, pooled.detach(), 0.1, gamma, loss), x)
    clear = gradient.abs() > 1e-6  # far above Adam's epsilon
    assert torch.allclose((before - after)[clear], 0.05 * gradient.sign()[clear], atol=1e-4)
    assert clear.any() == (loss == "paper" or x.shape[1] > 1), "numbers of one channel are as alike as they can be"


def test_every_step_costs_one_call_of_the_denoiser_and_the_pipeline_is_restored(pipe, kind):
    stock, shape = Baseline().generate(pipe, GROUP, CALLS[kind]).images, shape_of(pipe)
    method, timesteps = ContrastiveNoise("m", inner_steps=3, learning_rate=0.1), []
    with denoiser_calls(pipe, lambda call, arguments: timesteps.append(call.timestep) or arguments):
        result = method.generate(pipe, GROUP, CALLS[kind])
    assert timesteps == [timesteps[0]] * 3 + [timesteps[0], timesteps[-1]] and timesteps[-1] < timesteps[0]
    assert len(set(result.statistics["losses"])) == 3, "each step starts where the last one ended"
    assert np.isfinite(result.images).all() and not np.allclose(result.images, stock, atol=1e-2)
    assert shape_of(pipe) == shape and not {"step", "prepare_latents"} & {*vars(pipe.scheduler), *vars(pipe)}
    assert np.array_equal(Baseline().generate(pipe, GROUP, CALLS[kind]).images, stock)


@pytest.mark.parametrize(("settings", "size"), [({"inner_steps": 0}, 2), ({"learning_rate": 0}, 2), ({}, 1)])
def test_without_a_step_or_another_image_it_is_the_baseline_bit_for_bit(tiny_sdxl, settings, size):
    group = Group("one", "a red thing", "red", 0, size)
    stock = Baseline().generate(tiny_sdxl, group, CALLS["sdxl"])
    method = ContrastiveNoise("m", **settings)
    assert np.array_equal(method.generate(tiny_sdxl, group, CALLS["sdxl"]).images, stock.images)


def test_it_cannot_be_combined():
    with pytest.raises(ValueError, match=r"which make several"):
        Combined("m", {"one": ContrastiveNoise("c")})
