"""The controls move what NegToMe moves: as many tokens, and the noise as far; only why and where to is taken away."""

import numpy as np
import pytest
import torch

from experiments.methods.controls import NoiseControl, RandomMatch, changed
from experiments.methods.negtome import NegToMe
from experiments.prompts import Group
from negtome.merge import push_groups

K = 3
STRENGTH = {"alpha": 0.9, "threshold": 0.2}
CONFIG = {"alpha": 0.9, "threshold": -1.0, "timestep_range": [0, 1000], "min_side": 4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pushed():
    """Tokens of two groups of three images, and what NegToMe makes of them: some move, some stay."""
    tokens = torch.randn(2 * K, 16, 8, generator=generator(7))
    moved = push_groups(tokens, K, matching="paper", reference="first", **STRENGTH)[0]
    share = changed(tokens, moved)[tokens.shape[0] // K :].float().mean()
    assert 0.1 < share < 0.95
    return tokens, moved


def test_noise_moves_the_same_tokens_exactly_as_far(pushed):
    tokens, moved = pushed
    noise = NoiseControl("c", **STRENGTH).replace(tokens, moved, K, generator())
    assert torch.equal(changed(tokens, noise), changed(tokens, moved))
    far, as_far = ((result - tokens).norm(dim=-1) for result in (moved, noise))
    torch.testing.assert_close(as_far, far, rtol=1e-5, atol=1e-6)
    # In other directions: of 8 dimensions, a random one is nearly at right angles on average.
    where = changed(tokens, moved).squeeze(-1)
    cosine = torch.nn.functional.cosine_similarity((noise - tokens)[where], (moved - tokens)[where])
    assert cosine.mean().abs() < 0.25 and cosine.max() < 0.999


def test_a_random_match_pushes_the_same_tokens_from_a_token_of_the_first_image(pushed):
    tokens, moved = pushed
    result = RandomMatch("c", **STRENGTH).replace(tokens, moved, K, generator())
    where = changed(tokens, moved).squeeze(-1)
    assert torch.equal(result[~where], tokens[~where])
    # x' = x + alpha (x - r), so r = x - (x' - x) / alpha: one of the first image's tokens, seldom the nearest.
    match = (tokens - (result - tokens) / STRENGTH["alpha"]).unflatten(0, (-1, K))
    first = tokens.unflatten(0, (-1, K))[:, :1]
    distance = torch.cdist(match, first.expand_as(match)).flatten(0, 1)[where]
    assert distance.min(dim=-1).values.max() < 1e-4
    nearest = torch.cdist((tokens - (moved - tokens) / STRENGTH["alpha"]).unflatten(0, (-1, K)), first.expand_as(match))
    same = distance.argmin(dim=-1) == nearest.flatten(0, 1)[where].argmin(dim=-1)
    assert same.float().mean() < 0.3


def test_the_halves_of_guidance_draw_alike():
    half = torch.randn(K, 16, 8, generator=generator(3))
    tokens = torch.cat([half, half])
    moved = push_groups(tokens, K, matching="paper", reference="first", **STRENGTH)[0]
    for result in (
        RandomMatch("c", **STRENGTH).replace(tokens, moved, K, generator()),
        NoiseControl("c", **STRENGTH).replace(tokens, moved, K, generator()),
    ):
        assert torch.equal(*result.chunk(2))
        assert not torch.equal(result, tokens)


@pytest.mark.parametrize("control", [RandomMatch, NoiseControl])
def test_nothing_moves_where_negtome_moves_nothing(control):
    tokens = torch.randn(K, 4, 8, generator=generator())
    assert torch.equal(control("c").replace(tokens, tokens, K, generator()), tokens)


@pytest.mark.parametrize("control", [RandomMatch, NoiseControl])
def test_on_a_pipeline_the_first_image_stays_and_equal_seeds_give_equal_images(control, kind, pipe):
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    call |= {"max_sequence_length": 16} if kind == "flux" else {}
    drawn = [
        method.generate(pipe, Group("a", "a red thing", "red", 0, 2), call)
        for method in (
            NegToMe("n", **CONFIG), control("c", **CONFIG), control("c", **CONFIG), control("c", seed=1, **CONFIG),
        )
    ]  # fmt: skip
    plain, once, again, other = (one.images for one in drawn)
    assert np.array_equal(once[0], plain[0]) and not np.array_equal(once[1], plain[1])
    assert np.array_equal(again, once) and not np.array_equal(other, once)
    # In the first step as many tokens were moved as by NegToMe; later ones see other features.
    by_negtome, counted = (one.statistics for one in drawn[:2])
    assert counted["tokens_compared"] == by_negtome["tokens_compared"] == counted["tokens_pushed"]


def test_a_control_is_another_method_than_negtome_and_than_the_other():
    settings = [method("m", **CONFIG).settings() for method in (NegToMe, RandomMatch, NoiseControl)]
    assert [one["matching"] for one in settings] == ["paper", "random", "noise"]
