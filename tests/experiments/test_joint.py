"""What is driven apart inside of Flux's blocks: formulas written out pair by pair, and what a call really did."""

from functools import partial

import pytest
import torch
from test_methods import CALLS

from experiments.methods.contextual_repulsion import ContextualRepulsion, entropy_slope
from experiments.methods.feature_guidance import FeatureGuidance
from experiments.methods.joint import step_on_cosines
from experiments.methods.method import sample
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 3)


def cosine(one, other):
    return (one * other).sum() / one.norm() / other.norm()


def likeness(images, temperature):
    """log mean exp(cos / T) over all ordered pairs, an image with itself among them."""
    pairs = [torch.exp(cosine(one, other) / temperature) for one in images for other in images]
    return torch.log(sum(pairs) / len(pairs))


def entropy(images):
    kernel = torch.stack([torch.stack([cosine(one, other) for other in images]) for one in images]) / len(images)
    values = torch.linalg.eigvalsh(kernel)
    return -(values * values.log()).sum()


def ascended(energy, features, rate, steps, relative):
    """Take the same steps by autograd, in float64, one group at a time."""
    groups = []
    for group in features.double().split(GROUP.size):
        for _ in range(steps):
            group = group.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy([image.flatten() for image in group]), group)
            squares = torch.stack([image.square().sum() for image in group]).view(-1, 1, 1)
            group = group + rate * slope * (squares if relative else 1)
        groups.append(group.detach())
    return torch.cat(groups)


def features(seed=0, alike=1.0):
    """Two groups of three images, 4 tokens of 5 channels each, the one group far longer than the other."""
    own, shared = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed))
    return (shared[:1] + alike * own) * torch.tensor([1.0, 2, 3, 10, 20, 30]).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("slope", "energy"),
    [(FeatureGuidance("m", temperature=0.4).slope, partial(likeness, temperature=0.4)), (entropy_slope, entropy)],
    ids=["likeness", "entropy"],
)
@pytest.mark.parametrize(("relative", "rate"), [(True, 0.1), (True, -0.1), (False, 0.5)])
def test_steps_are_those_of_the_gradient_that_autograd_finds(slope, energy, relative, rate):
    given = features()
    moved = step_on_cosines(given, slope, rate, 3, GROUP.size, relative)
    assert torch.allclose(moved.double(), ascended(energy, given, rate, 3, relative), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, given, atol=1e-2)


def test_images_that_are_almost_the_same_are_driven_apart_along_what_they_differ_in():
    """As texts are that have just met the images."""
    given = features(alike=1e-4)
    moved = step_on_cosines(given, entropy_slope, 0.5, 4, GROUP.size, relative=True) - given
    expected = ascended(entropy, given, 0.5, 4, relative=True) - given
    assert moved.abs().max() > 1e-3
    assert torch.allclose(moved.double(), expected, rtol=1e-3, atol=1e-5 * given.abs().max())


def test_images_that_are_the_same_stay():
    given = features()[:1].repeat(3, 1, 1)
    assert torch.allclose(step_on_cosines(given, entropy_slope, 1.0, 5, GROUP.size, relative=True), given, atol=1e-5)


def test_tokens_keep_their_precision():
    given = features().bfloat16()
    moved = step_on_cosines(given, entropy_slope, 0.5, 2, GROUP.size, relative=True)
    assert moved.dtype == torch.bfloat16
    assert torch.allclose(moved.float(), ascended(entropy, given, 0.5, 2, True).float(), rtol=2**-7)


@pytest.fixture
def watched(tiny_flux):
    """What two steps of a call do in the blocks: `watched(method)` returns, a step and block, what came and went.

    In the order of the blocks, as ((text, image) as the block computed it, (text, image) as the next one got it, what
    the block was given); of the last block nothing goes on. The timesteps are 1000 and 500.
    """
    blocks = [*tiny_flux.transformer.transformer_blocks, *tiny_flux.transformer.single_transformer_blocks]

    def watch(method):
        given, computed = [], []
        hooks = [
            hook
            for block in blocks
            for hook in (
                block.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True),
                block.register_forward_hook(lambda _, args, output: computed.append(output)),
            )
        ]
        with method.apply(tiny_flux, GROUP, CALLS["flux"]) as applied:
            sample(tiny_flux, GROUP, applied.call)
        for hook in hooks:
            hook.remove()
        went = [(kwargs["encoder_hidden_states"], kwargs["hidden_states"]) for kwargs in given[1:]]
        steps = list(zip(computed, [*went, None], given, strict=True))
        return steps[: len(blocks)], steps[len(blocks) :]

    return watch


def test_feature_guidance_disperses_the_images_and_asks_the_block_again(watched, tiny_flux):
    method = FeatureGuidance("m", w=0.1, relative=True, n_opt=3, temperature=0.5, mix=0.3)
    first, second = watched(method)
    for number, (out, on, given) in enumerate(first[:-1]):
        assert torch.equal(on[0], out[0]), "the text goes on as the block left it"
        if number != 1:
            assert torch.equal(on[1], out[1])
            continue
        apart = ascended(partial(likeness, temperature=0.5), out[1], -0.1, 3, relative=True).float()
        with torch.no_grad():
            _, again = tiny_flux.transformer.transformer_blocks[1](
                hidden_states=apart, encoder_hidden_states=out[0], temb=given["temb"],
                image_rotary_emb=given["image_rotary_emb"],
            )  # fmt: skip
        assert torch.allclose(on[1], 0.3 * again + 0.7 * apart, atol=1e-4)
        assert not torch.allclose(on[1], out[1], atol=1e-2)
    assert all(torch.equal(one, other) for out, on, _ in second[:-1] for one, other in zip(out, on, strict=True))


def test_contextual_repulsion_moves_the_texts_and_where_there_is_one_stream_all_tokens(watched):
    method = ContextualRepulsion("m", eta=0.5, relative=True, inner_steps=3)
    first, second = watched(method)
    for (text, image), on, _ in first[:2]:
        assert torch.allclose(on[0].double(), ascended(entropy, text, 0.5 / 3, 3, True), rtol=1e-3, atol=1e-3)
        assert torch.equal(on[1], image) and not torch.allclose(on[0], text, atol=1e-3)
    (text, image), on, _ = first[2]
    everything = ascended(entropy, torch.cat([text, image], dim=1), 0.5 / 3, 3, True)
    assert torch.allclose(torch.cat(on, dim=1).double(), everything, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(on[1], image, atol=1e-3)
    assert all(torch.equal(one, other) for out, on, _ in second[:-1] for one, other in zip(out, on, strict=True))


def test_repulsion_in_more_steps_moves_the_second_too(watched):
    _, second = watched(ContextualRepulsion("m", eta=0.5, relative=True, inner_steps=3, first_steps=2))
    assert not torch.equal(second[0][0][0], second[0][1][0])
