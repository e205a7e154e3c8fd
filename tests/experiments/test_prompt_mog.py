"""PromptMoG: its mixture, the formula, and the embeddings that a denoiser receives."""

import math

import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.method import sample
from experiments.methods.prompt_mog import PromptMoG, mixture_offsets, simplex
from experiments.methods.steps import denoiser_calls


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_simplex_has_unit_corners_at_equal_angles(count):
    cosines = simplex(count) @ simplex(count).T
    expected = torch.full((count, count), -1 / (count - 1)).fill_diagonal_(1)
    assert torch.allclose(cosines, expected, atol=1e-6)


def test_images_share_the_rotated_modes_of_each_token():
    directions, noise = mixture_offsets(40, 3, 12, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(directions.norm(dim=2), torch.ones(40, 3), atol=1e-5)
    for token in directions.unbind(1):
        cosines = token @ token.T
        assert torch.isclose(cosines, torch.tensor(1.0), atol=1e-5).any(dim=1).all()
        assert (torch.isclose(cosines, torch.tensor(1.0), atol=1e-5) | (cosines + 1 / 3).abs().lt(1e-5)).all()
        assert len({tuple(row.tolist()) for row in token.mul(100).round()}) == 4, "all modes occur"
    assert not torch.allclose(directions[:, 0], directions[:, 1], atol=0.1), "tokens are rotated differently"
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 5 / math.sqrt(noise.numel())


def naive(tokens, directions, noise, gamma, sigma, relative):
    """Move the tokens of one image, lists of lists of numbers, one by one."""
    texts = [token for token in tokens if any(token)]
    length = math.sqrt(sum(a * a for token in texts for a in token) / len(texts)) if relative else 1
    deviation = sigma / math.sqrt(len(tokens[0])) if relative else sigma
    moved = []
    for place, token in enumerate(tokens):
        if place in (0, 1, len(tokens) - 1) or not any(token):
            moved.append(token)
            continue
        triples = zip(token, directions[place], noise[place], strict=True)
        moved.append([a + length * (gamma * u + deviation * n) for a, u, n in triples])
    return moved


@pytest.mark.parametrize("relative", [True, False])
def test_the_formula(relative):
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(2, 7, 6, generator=generator)
    tokens[1, 4:] = 0  # padding
    directions, noise = mixture_offsets(2, 7, 6, 4, generator)
    method = PromptMoG("m", gamma=0.6, sigma=0.25, relative=relative)
    parts = zip(tokens.tolist(), directions.tolist(), noise.tolist(), strict=True)
    expected = torch.tensor([naive(*part, 0.6, 0.25, relative) for part in parts])
    assert torch.allclose(method.moved(tokens, directions, noise), expected, atol=1e-5)
    strong = PromptMoG("m", gamma=1e6, relative=relative).moved(tokens.half(), directions, noise)
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
    unchanged = tokens_of(pipe, kind, PromptMoG("m", gamma=0, sigma=0))
    moved = tokens_of(pipe, kind, PromptMoG("m", gamma=0.7, sigma=0, modes=8))
    for before, after in zip(unchanged, moved, strict=True):
        tokens, pooled = before
        offset = after[tokens] - before[tokens]
        assert torch.equal(after[pooled], before[pooled]) and not offset[:, [0, 1, -1]].any()
        assert kind == "flux" or not offset[:2].any(), "the unconditional half stays"
        assert torch.allclose(offset[-2:, 2:-1].norm(dim=2), torch.tensor(0.7), atol=1e-4)
        assert not torch.allclose(offset[-2], offset[-1], atol=1e-3)
        assert torch.equal(after[tokens], moved[0][tokens])


def test_more_modes_than_fit_are_refused(pipe, kind):
    with pytest.raises(ValueError, match=r"modes must be at most \d+ for this model"):
        tokens_of(pipe, kind, PromptMoG("m", modes=200))
