"""SPARKE: the gradient of its score, and the latents that a step begins with."""

import functools

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from test_methods import CALLS

from experiments.methods.method import sample
from experiments.methods.sparke import SPARKE, entropy_gradient
from experiments.methods.steps import replaced
from experiments.prompts import Group

THREE = Group("one", "a red thing", "red", 0, 3)


def score(latents, texts, sigma, sigma_text):
    """Return the conditional RKE score of one group, from the definition, pair by pair."""
    z, y = (x / x.norm(dim=1, keepdim=True) for x in (latents, texts))
    prompts, joint = [], []
    for i in range(len(z)):
        for j in range(len(z)):
            alike = torch.exp(-((y[i] - y[j]) ** 2).sum() / (2 * sigma_text**2))
            prompts.append(alike**2)
            joint.append((alike * torch.exp(-((z[i] - z[j]) ** 2).sum() / (2 * sigma**2))) ** 2)
    return sum(prompts) / sum(joint)


@pytest.mark.parametrize("K", [2, 4])
def test_the_gradient_is_that_of_the_score(K):
    generator = torch.Generator().manual_seed(K)
    latents = torch.randn(2, K, 10, generator=generator, dtype=torch.float64)
    texts = torch.randn(2, K, 5, generator=generator, dtype=torch.float64)
    gradients = entropy_gradient(latents, texts, 0.8, 0.9)
    for x, y, gradient in zip(latents, texts, gradients, strict=True):
        x = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(score(x, y, 0.8, 0.9), x)
        # For a latent itself, the gradient is shorter by the latent's length.
        assert torch.allclose(gradient / x.detach().norm(dim=1, keepdim=True), expected, rtol=1e-8)


def test_images_of_other_texts_do_not_repel_and_equal_images_stay():
    latents = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(0))
    apart = torch.eye(3)[None]
    assert entropy_gradient(latents, apart, 0.8, 0.05).abs().max() < 1e-6
    assert entropy_gradient(latents, torch.ones(1, 3, 3), 0.8, 0.05).abs().max() > 1e-3
    method = SPARKE("m", entropy_scale=0.5)
    equal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half().expand(7, -1, -1, -1)
    assert torch.equal(method.moved(equal, torch.ones(7, 5), 7), equal)


def test_latents_move_by_a_share_of_their_length_and_the_score_rises():
    latents = 7 * torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    texts = torch.ones(3, 5)
    moved = SPARKE("m", entropy_scale=0.1).moved(latents, texts, 3)
    lengths = (moved - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor(0.1), atol=1e-5)
    assert score(moved.flatten(1), texts, 0.8, 0.35) > score(latents.flatten(1), texts, 0.8, 0.35)


def latents_of_steps(pipe, kind, method):
    """Return the latents of each scheduler call in four steps: those that the scheduler gets, and the pipeline's."""
    scheduler, call, pairs = pipe.scheduler, CALLS[kind] | {"num_inference_steps": 4}, []
    original = scheduler.step

    @functools.wraps(original)
    def inner(model_output, timestep, latents, *args, **kwargs):
        pairs.append([latents])
        return original(model_output, timestep, latents, *args, **kwargs)

    with replaced(scheduler, "step", inner), method.apply(pipe, THREE, call):
        moving = scheduler.step

        @functools.wraps(original)
        def outer(model_output, timestep, latents, *args, **kwargs):
            result = moving(model_output, timestep, latents, *args, **kwargs)
            pairs[-1].append(latents)
            return result

        with replaced(scheduler, "step", outer):
            sample(pipe, THREE, call)
    return pairs


def calls_that_move(pairs):
    return [number for number, (after, before) in enumerate(pairs) if not torch.equal(after, before)]


@pytest.mark.parametrize(("interval", "moves"), [(1, [0, 1, 2, 3]), (3, [0, 3]), (10, [0])])
def test_every_so_many_steps_begin_with_moved_latents(pipe, kind, interval, moves):
    method = SPARKE("m", entropy_scale=0.05, interval=interval)
    pairs = latents_of_steps(pipe, kind, method)
    assert calls_that_move(pairs) == moves
    after, before = pairs[0]
    assert torch.equal(after, method.moved(before, torch.ones(3, 1), 3)), "images of one prompt have equal texts"


@pytest.mark.parametrize(("interval", "moves"), [(1, [0, 2, 4, 6]), (2, [0, 4])])
def test_a_second_order_step_moves_the_latents_once(tiny_sdxl, interval, moves):
    tiny_sdxl.scheduler = HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    pairs = latents_of_steps(tiny_sdxl, "sdxl", SPARKE("m", entropy_scale=0.05, interval=interval))
    assert len(pairs) == 7 and calls_that_move(pairs) == moves
