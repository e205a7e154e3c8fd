"""PromptMoG: its mixture, the formula, and the embeddings that a denoiser receives."""

import math

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.method import sample
from experiments.methods.prompt_mog import PromptMoG, mixed, mixture_offsets
from experiments.methods.steps import denoiser_calls


@pytest.mark.parametrize("modes", [2, 4, 12])
def test_images_and_tokens_share_rotated_modes_at_equal_angles(modes):
    directions, noise = mixture_offsets(torch.Size((40, 3, 12)), modes, torch.Generator().manual_seed(0))
    assert torch.allclose(directions.norm(dim=2), torch.ones(40, 3), atol=1e-5)
    units = directions.flatten(0, 1)
    cosines = units @ units.T
    assert (torch.isclose(cosines, torch.tensor(1.0), atol=1e-5) | (cosines + 1 / (modes - 1)).abs().lt(1e-5)).all()
    assert len({tuple(row.tolist()) for row in units.mul(100).round()}) == modes, "all modes occur"
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 5 / math.sqrt(noise.numel())


def naive(tokens, directions, noise, cosine, sigma):
    """Move the tokens of one image, lists of lists of numbers, one by one, as far as the code does for a cosine."""
    moved = []
    for place, token in enumerate(tokens):
        if place in (0, 1, len(tokens) - 1):
            moved.append(token)
            continue
        distance = math.sqrt(sum(a * a for a in token)) * math.sqrt(2 * (1 - cosine))
        deviation = sigma * distance / math.sqrt(len(token))
        triples = zip(token, directions[place], noise[place], strict=True)
        moved.append([a + distance * u + deviation * n for a, u, n in triples])
    return moved


def test_the_formula():
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(2, 7, 6, generator=generator)
    tokens[1, 4:] = 0  # padding
    directions, noise = mixture_offsets(tokens.shape, 4, generator)
    parts = zip(tokens.tolist(), directions.tolist(), noise.tolist(), strict=True)
    expected = torch.tensor([naive(*part, 0.6, 0.25) for part in parts])
    assert torch.allclose(mixed(tokens, directions, noise, math.sqrt(2 * 0.4), 0.25), expected, atol=1e-5)
    strong = mixed(tokens.half(), directions, noise, 1e6, 0.25)
    assert strong.dtype == torch.float16 and strong.isfinite().all()


def tokens_of(pipe, kind, method):
    calls = []
    with (
        method.apply(pipe, PAIR, CALLS[kind]),
        denoiser_calls(pipe, lambda call, arguments: calls.append(dict(call.prompts)) or arguments),
    ):
        sample(pipe, PAIR, CALLS[kind] | {"num_inference_steps": 3})
    return calls


def test_the_denoiser_gets_one_draw_an_image_in_all_steps(pipe, kind):
    unchanged = tokens_of(pipe, kind, PromptMoG("m", distance=0))
    moved = tokens_of(pipe, kind, PromptMoG("m", distance=0.7, sigma=0, modes=8))
    for before, after in zip(unchanged, moved, strict=True):
        tokens, pooled = before
        offset = after[tokens] - before[tokens]
        assert torch.equal(after[pooled], before[pooled]) and not offset[:, [0, 1, -1]].any()
        assert kind == "flux" or not offset[:2].any(), "the unconditional half stays"
        lengths = 0.7 * before[tokens][-2:, 2:-1].norm(dim=2)
        assert torch.allclose(offset[-2:, 2:-1].norm(dim=2), lengths, rtol=1e-4)
        assert not torch.allclose(offset[-2], offset[-1], atol=1e-3)
        assert torch.equal(after[tokens], moved[0][tokens])


def test_more_modes_than_fit_are_refused(pipe, kind):
    with pytest.raises(ValueError, match=r"modes must be at most \d+ for this model"):
        tokens_of(pipe, kind, PromptMoG("m", modes=200))
