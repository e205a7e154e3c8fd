"""The controls move the same tokens as NegToMe, the noise just as far; only the reason and the target differ."""

import numpy as np
import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.controls import NoiseControl, RandomMatch, changed
from experiments.methods.negtome import NegToMe
from negtome.merge import push_groups

K = 3
STRENGTH = {"alpha": 0.9, "threshold": 0.2}
CONFIG = {"alpha": 0.9, "threshold": -1.0, "timestep_range": [0, 1000], "min_side": 4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def push(tokens):
    return push_groups(tokens, K, matching="paper", reference="first", **STRENGTH)[0]


@pytest.fixture
def pushed():
    """Tokens of two groups of three images before and after NegToMe: some move, some stay."""
    tokens = torch.randn(2 * K, 16, 8, generator=generator(7))
    moved = push(tokens)
    assert 0.1 < changed(tokens, moved)[len(tokens) // K :].float().mean() < 0.95
    return tokens, moved


def test_noise_moves_the_same_tokens_exactly_as_far(pushed):
    tokens, moved = pushed
    noise = NoiseControl("c", **STRENGTH).replace(tokens, moved, K, generator())
    assert torch.equal(changed(tokens, noise), changed(tokens, moved))
    torch.testing.assert_close((noise - tokens).norm(dim=-1), (moved - tokens).norm(dim=-1), rtol=1e-5, atol=1e-6)
    # In other directions: in 8 dimensions, a random one is nearly at right angles on average.
    mask = changed(tokens, moved).squeeze(-1)
    cosine = torch.nn.functional.cosine_similarity((noise - tokens)[mask], (moved - tokens)[mask])
    assert cosine.mean().abs() < 0.25 and cosine.max() < 0.999


def test_a_random_match_pushes_the_same_tokens_from_a_token_of_the_first_image(pushed):
    tokens, moved = pushed
    result = RandomMatch("c", **STRENGTH).replace(tokens, moved, K, generator())
    mask = changed(tokens, moved).squeeze(-1)
    assert torch.equal(result[~mask], tokens[~mask])

    def match_of(result):
        """Distances of r = x - (x' - x) / alpha, which solves x' = x + alpha (x - r), to the first image's tokens."""
        match = (tokens - (result - tokens) / STRENGTH["alpha"]).unflatten(0, (-1, K))
        first = tokens.unflatten(0, (-1, K))[:, :1]
        return torch.cdist(match, first.expand_as(match)).flatten(0, 1)[mask]

    assert match_of(result).min(dim=-1).values.max() < 1e-4
    is_nearest = match_of(result).argmin(dim=-1) == match_of(moved).argmin(dim=-1)
    assert is_nearest.float().mean() < 0.3


@pytest.mark.parametrize("control", [RandomMatch, NoiseControl])
def test_both_halves_of_guidance_get_the_same_and_unmoved_tokens_stay(control):
    half = torch.randn(K, 16, 8, generator=generator(3))
    tokens = torch.cat([half, half])
    result = control("c", **STRENGTH).replace(tokens, push(tokens), K, generator())
    assert torch.equal(*result.chunk(2))
    assert not torch.equal(result, tokens)
    assert torch.equal(control("c").replace(tokens, tokens, K, generator()), tokens)


@pytest.mark.parametrize("control", [RandomMatch, NoiseControl])
def test_on_a_pipeline_the_first_image_stays_and_equal_seeds_give_equal_images(control, kind, pipe):
    methods = (NegToMe("n", **CONFIG), control("c", **CONFIG), control("c", **CONFIG), control("c", seed=1, **CONFIG))
    results = [method.generate(pipe, PAIR, CALLS[kind]) for method in methods]
    negtome, once, again, other = (result.images for result in results)
    assert np.array_equal(once[0], negtome[0]) and not np.array_equal(once[1], negtome[1])
    assert np.array_equal(again, once) and not np.array_equal(other, once)
    # In the first step as many tokens were moved as by NegToMe; later ones see other features.
    expected, counts = (result.statistics for result in results[:2])
    assert counts["tokens_compared"] == expected["tokens_compared"] == counts["tokens_pushed"]


def test_a_control_has_another_identity_than_negtome_and_the_other_control():
    settings = [method("m", **CONFIG).settings() for method in (NegToMe, RandomMatch, NoiseControl)]
    assert [one["matching"] for one in settings] == ["paper", "random", "noise"]
