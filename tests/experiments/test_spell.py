"""SPELL: balls around the other images of a group, and around reference images."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_methods import CALLS, shape_of

from experiments.methods.method import Baseline, sample
from experiments.methods.spell import SPELL, SPELLFromAssets, repellency
from experiments.methods.steps import predictions
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 3)


def naive(x, shielded, radius):
    """Return the push on one latent [N] from every z of a list, ball by ball."""
    moved = torch.zeros_like(x)
    for z in shielded:
        apart = math.dist(x.tolist(), z.tolist())
        if 0 < apart < radius:
            moved += (radius / apart - 1) * (x - z)
    return moved


def test_the_repellency_is_the_sum_over_the_balls():
    groups = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shielded in (groups, groups[:1, :2] + 1):
        pushes = repellency(groups, shielded, 3.5)
        for group, balls, rows in zip(groups, shielded.expand(2, -1, -1), pushes, strict=True):
            expected = torch.stack([naive(x, balls, 3.5) for x in group])
            assert torch.allclose(rows, expected, rtol=1e-9)
        assert pushes.any() and not repellency(groups, shielded, 0.1).any()


def test_what_is_in_one_ball_alone_is_put_onto_its_surface():
    x, z = torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[0.0, 0, 0], [9, 9, 9]]])
    assert torch.allclose(x + repellency(x, z, 2.0), torch.tensor([2.0, 0, 0]))


def seen(pipe, kind, method, group=GROUP):
    """Return the clean latents of every step as they were predicted and as they were changed, [K, N] each."""
    before, after = [], []
    watched = predictions(pipe, lambda p: after.append(p.clean.flatten(1)) or p.clean)
    with (
        watched,
        method.apply(pipe, group, CALLS[kind]) as applied,
        predictions(pipe, lambda p: before.append(p.clean.flatten(1)) or p.clean),
    ):
        sample(pipe, group, applied.call)
    return list(zip(before, after, strict=True)), applied


def test_of_a_group_the_others_are_shielded(pipe, kind):
    steps, _ = seen(pipe, kind, SPELL("m", radius=8.0, overcompensation=1.2))
    for before, after in steps:
        radius = 8.0 * math.sqrt(before.shape[1])
        moved = [1.2 * naive(x, [z for k, z in enumerate(before) if k != i], radius) for i, x in enumerate(before)]
        assert torch.allclose(after, before + torch.stack(moved), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*steps[0], atol=1e-2)


@pytest.fixture
def finder():
    """A stand-in for a retriever: two images for a prompt of red things, of another size than the generated ones."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 32), dtype=np.uint8)
    assets = [(SimpleNamespace(image=torch.from_numpy(p), label=f"red/{i}.png"), 0.9) for i, p in enumerate(pixels)]
    return SimpleNamespace(
        find=lambda pipe, group, call: assets if "red" in group.prompt else [], settings=lambda: {"assets": "red"}
    )


@pytest.mark.parametrize("images", [None, 1])
def test_of_assets_their_encoded_pictures_are_shielded(pipe, kind, finder, images):
    steps, applied = seen(pipe, kind, SPELLFromAssets("m", radius=8.0, retriever=finder, images=images))
    assert applied.references == dict([("red/0.png", 0.9), ("red/1.png", 0.9)][:images])
    balls, config = [], pipe.vae.config
    for asset, _ in finder.find(pipe, GROUP, {})[:images]:
        # Half as high as wide: it fits unscaled, and the first and last rows are repeated above and below.
        padded = torch.nn.functional.pad(asset.image[None].float(), (0, 0, 8, 8), mode="replicate")
        with torch.no_grad():
            latent = pipe.vae.encode(padded / 127.5 - 1).latent_dist.mode()
        latent = (latent - (config.shift_factor or 0)) * config.scaling_factor
        packed = pipe._pack_latents(latent, *latent.shape) if kind == "flux" else latent
        balls.append(packed.flatten())
    for before, after in steps:
        radius = 8.0 * math.sqrt(before.shape[1])
        moved = torch.stack([1.6 * naive(x, balls, radius) for x in before])
        assert torch.allclose(after, before + moved, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*steps[0], atol=1e-2)


def test_where_no_asset_is_near_or_the_radius_is_0_nothing_happens(pipe, kind, finder):
    far = Group("two", "a blue thing", "blue", 0, 2)
    stock = Baseline().generate(pipe, far, CALLS[kind])
    shape = shape_of(pipe)
    drawn = SPELLFromAssets("m", radius=8.0, retriever=finder).generate(pipe, far, CALLS[kind])
    assert np.array_equal(drawn.images, stock.images) and drawn.references == {}
    near = SPELLFromAssets("m", radius=0, retriever=finder).generate(pipe, GROUP, CALLS[kind])
    assert (
        np.array_equal(near.images, Baseline().generate(pipe, GROUP, CALLS[kind]).images) and len(near.references) == 2
    )
    alone = Group("one", "a red thing", "red", 0, 1)
    pushed = SPELLFromAssets("m", radius=8.0, retriever=finder).generate(pipe, alone, CALLS[kind])
    assert not np.array_equal(pushed.images, Baseline().generate(pipe, alone, CALLS[kind]).images)
    assert shape_of(pipe) == shape


def test_settings_are_part_of_the_identity(finder):
    settings = SPELLFromAssets("m", radius=2, retriever=finder, images=1).settings()
    assert settings == {
        "radius": 2.0, "overcompensation": 1.6, "images": 1, "reference": "assets", "retriever": {"assets": "red"},
    }  # fmt: skip
