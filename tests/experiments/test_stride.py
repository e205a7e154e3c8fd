"""STRIDE: its perturbation, and the features that the denoiser goes on with."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from test_methods import CALLS

from experiments.methods.method import sample
from experiments.methods.stride import STRIDE, grid_of, image_blocks, perturb
from experiments.prompts import Group

THREE = Group("one", "a red thing", "red", 0, 3)


def naive(h, noise, components, strength):
    """Perturb one image's features [N, C], by a singular value decomposition in NumPy, token by token."""
    deviations = h - h.mean(axis=0)
    axes = np.linalg.svd(deviations, full_matrices=False)[2][:components]
    projected = np.stack([sum((token @ axis) * axis for axis in axes) for token in noise])
    return h + strength * np.linalg.norm(deviations) * projected / np.linalg.norm(projected)


@pytest.mark.parametrize("components", [1, 3, 5])
def test_the_noise_is_on_the_principal_components(components):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    features, noise = torch.randn(2, 9, 5, generator=generator) * scales + 7, torch.randn(2, 9, 5, generator=generator)
    rows = zip(features.double().numpy(), noise.double().numpy(), strict=True)
    expected = torch.from_numpy(np.stack([naive(*row, components, 0.4) for row in rows])).float()
    assert torch.allclose(perturb(features, noise, components, 0.4), expected, atol=1e-4)
    half = perturb(features.half(), noise, components, 1e6)
    assert half.dtype == torch.float16 and half.isfinite().all()
    flat = torch.ones(1, 9, 5)
    assert torch.equal(perturb(flat, noise[:1], components, 0.4), flat), "features without deviations stay"


def test_the_grid_of_smaller_feature_maps():
    assert [grid_of(tokens, (16, 24)) for tokens in (384, 96, 24)] == [(16, 24), (8, 12), (4, 6)]
    assert grid_of(3 * 5, (5, 9)) == (3, 5)


def features_of(pipe, kind, method, steps):
    """Return what the method's block returns in each call of the denoiser, image tokens alone."""
    seen = []
    with method.apply(pipe, THREE, CALLS[kind]):
        block = image_blocks(pipe, "m")[method.block - 1]
        hook = block.register_forward_hook(
            lambda _, args, output: seen.append(output[-1] if kind == "flux" else output)
        )
        sample(pipe, THREE, CALLS[kind] | {"num_inference_steps": steps})
        hook.remove()
    return seen


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_steps_go_on_with_the_same_noise(pipe, kind, steps):
    before = features_of(pipe, kind, STRIDE("m", noise_length=0), steps)
    after = features_of(pipe, kind, STRIDE("m", noise_length=0.3, first_steps=2), steps)
    change, deviations = after[0] - before[0], before[0] - before[0].mean(dim=1, keepdim=True)
    shares = change.flatten(1).norm(dim=1) / deviations.flatten(1).norm(dim=1)
    assert torch.allclose(shares, torch.tensor(0.3), atol=1e-3)
    directions = torch.nn.functional.normalize(change.flatten(1), dim=1)
    assert (directions[-3:] @ directions[-3:].T).fill_diagonal_(0).abs().max() < 0.5, "each image has its own"
    if kind == "sdxl":
        assert (directions[:3] * directions[3:]).sum(dim=1).min() > 0.5, "which both halves of guidance share"


def count_perturbed_calls(pipe, kind):
    """Return in how many calls of the denoiser a method changes the first two steps of four.

    Latents of later steps differ already, so the calls of the formula are counted.
    """
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.methods.stride.perturb", lambda *a: counts.append(1) or perturb(*a))
        features_of(pipe, kind, STRIDE("m", noise_length=0.3, first_steps=2), 4)
    return len(counts)


def test_it_stops_after_the_first_steps(pipe, kind):
    assert count_perturbed_calls(pipe, kind) == 2 and not image_blocks(pipe, "m")[0]._forward_hooks


def test_both_halves_of_a_second_order_step_count_as_one_step(tiny_sdxl):
    tiny_sdxl.scheduler = HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    assert count_perturbed_calls(tiny_sdxl, "sdxl") == 4


def test_a_block_that_is_not_there_is_refused(pipe, kind):
    context = STRIDE("m", block=99).apply(pipe, THREE, CALLS[kind])
    with (
        pytest.raises(ValueError, match=r"method\.block must be at most \d+, the blocks of the model, got 99"),
        context,
    ):
        pass
