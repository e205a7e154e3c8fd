"""Contrastive noise optimisation: the loss, and the resulting initial noise of a pipeline."""

import math

import numpy as np
import pytest
import torch
from test_methods import CALLS, shape_of

import experiments.methods.contrastive_noise as module
from experiments.methods.combined import Combined
from experiments.methods.contrastive_noise import ContrastiveNoise, contrast
from experiments.methods.method import Baseline
from experiments.methods.steps import denoiser_calls, initial_noise
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 3)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / torch.linalg.vector_norm(x) / torch.linalg.vector_norm(y)


def naive(latents, first, temperature, gamma, loss):
    """The loss as it is written: image by image and, as released, place by place."""
    places = [slice(None)]
    if loss == "released":
        places = [(slice(None), y, x) for y in range(latents.shape[2]) for x in range(latents.shape[3])]
    terms = []
    for place in places:
        now, then = ([z[place].flatten() for z in rows] for rows in (latents, first))
        for i, x in enumerate(now):
            held = torch.exp(cosine(x, then[i]) / (gamma * temperature))
            others = sum(torch.exp(cosine(x, y) / temperature) for j, y in enumerate(now) if j != i)
            itself = held if loss == "released" else math.exp(1 / temperature)
            terms.append(-torch.log(held / (itself + others)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_the_loss_is_that_of_every_image_against_every_other(loss):
    latents, first = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(contrast(latents, first, 0.3, 0.8, loss), naive(latents, first, 0.3, 0.8, loss), rtol=1e-9)


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_the_first_step_of_adam_goes_down_the_gradient_of_each_number(pipe, kind, loss, monkeypatch):
    """As far as the learning rate, whatever the gradient's length."""
    given, clean = [], []

    def watched(pipe, change):
        def noted(noise):
            made = change(noise)
            given.append(made.clone())
            return made

        return initial_noise(pipe, noted)

    monkeypatch.setattr(module, "initial_noise", watched)
    method = ContrastiveNoise("m", inner_steps=1, learning_rate=0.05, window=4, loss=loss)
    first = method._first

    def kept(*args):
        found = first(*args)
        clean.append(found[1].clone())
        return found

    method._first = kept
    method.generate(pipe, GROUP, CALLS[kind])
    x = clean[0].requires_grad_()
    side = x.shape[2] // 4
    pooled = x.unflatten(3, (4, side)).unflatten(2, (4, side)).mean(dim=(3, 5))
    gamma = 1 / (0.1 * math.log(2) + 1)  # of three images
    (gradient,) = torch.autograd.grad(naive(pooled, pooled.detach(), 0.1, gamma, loss), x)
    assert len(given) == 2 and given[0].shape == gradient.shape
    clear = gradient.abs() > 1e-6  # far above the epsilon
    assert torch.allclose((given[0] - given[1])[clear], 0.05 * gradient.sign()[clear], atol=1e-4)
    assert clear.any() == (loss == "paper" or x.shape[1] > 1), "numbers of one channel are as alike as they can be"


def test_every_step_costs_one_call_of_the_denoiser_and_starts_where_the_last_one_ended(pipe, kind):
    calls = []
    with denoiser_calls(pipe, lambda call, arguments: calls.append(call.timestep) or arguments):
        drawn = ContrastiveNoise("m", inner_steps=3).generate(pipe, GROUP, CALLS[kind])
    assert calls == [calls[0]] * 3 + [calls[0], calls[-1]] and len(drawn.statistics["losses"]) == 3
    assert drawn.statistics["losses"][2] != drawn.statistics["losses"][0]


def test_it_changes_images_and_leaves_the_pipeline_as_it_was(pipe, kind):
    stock, shape = Baseline().generate(pipe, GROUP, CALLS[kind]).images, shape_of(pipe)
    made = ContrastiveNoise("m", learning_rate=0.1).generate(pipe, GROUP, CALLS[kind]).images
    assert np.isfinite(made).all() and not np.allclose(made, stock, atol=1e-2)
    assert shape_of(pipe) == shape and not {"step", "prepare_latents"} & {*vars(pipe.scheduler), *vars(pipe)}
    assert np.array_equal(Baseline().generate(pipe, GROUP, CALLS[kind]).images, stock)


@pytest.mark.parametrize("nothing", [{"inner_steps": 0}, {"learning_rate": 0}, {"size": 1}])
def test_without_a_step_or_another_image_it_is_the_baseline_bit_for_bit(pipe, kind, nothing):
    group = Group("one", "a red thing", "red", 0, nothing.get("size", 2))
    method = ContrastiveNoise("m", **{key: value for key, value in nothing.items() if key != "size"})
    stock = Baseline().generate(pipe, group, CALLS[kind])
    assert np.array_equal(method.generate(pipe, group, CALLS[kind]).images, stock.images)


def test_it_cannot_be_combined():
    with pytest.raises(ValueError, match=r"which make several"):
        Combined("m", {"one": ContrastiveNoise("c")})
