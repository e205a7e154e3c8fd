"""Methods inside Flux's blocks: formulas written out pair by pair, and the tokens of a call."""

import contextlib
from functools import partial

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from test_methods import CALLS

from experiments.methods.contextual_repulsion import ContextualRepulsion, entropy_slope
from experiments.methods.feature_guidance import FeatureGuidance
from experiments.methods.joint import step_on_cosines
from experiments.methods.method import sample
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 3)


def cosines(images):
    return torch.stack([torch.nn.functional.cosine_similarity(image, images, dim=1) for image in images])


def similarity(images, temperature):
    """Return log mean exp(cos / T) over all ordered pairs of images [K, N], including an image with itself."""
    return torch.exp(cosines(images) / temperature).mean().log()


def entropy(images):
    values = torch.linalg.eigvalsh(cosines(images) / len(images))
    return -(values * values.log()).sum()


def naive(energy, features, rate, steps, relative):
    """Ascend the energy by autograd, in float64, one group at a time."""
    groups = []
    for group in features.double().split(GROUP.size):
        for _ in range(steps):
            group = group.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(group.flatten(1)), group)
            scale = group.square().sum(dim=(1, 2), keepdim=True) if relative else 1
            group = group + rate * slope * scale
        groups.append(group.detach())
    return torch.cat(groups)


def features(alike=1.0):
    """Two groups of three images, 4 tokens of 5 channels each, the one group far longer than the other."""
    own, shared = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    return (shared[:1] + alike * own) * torch.tensor([1.0, 2, 3, 10, 20, 30]).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("slope", "energy"),
    [(FeatureGuidance("m", temperature=0.4).slope, partial(similarity, temperature=0.4)), (entropy_slope, entropy)],
    ids=["similarity", "entropy"],
)
@pytest.mark.parametrize(("relative", "rate"), [(True, 0.1), (True, -0.1), (False, 0.5)])
def test_steps_are_those_of_the_gradient_by_autograd(slope, energy, relative, rate):
    before = features()
    moved = step_on_cosines(before, slope, rate, 3, GROUP.size, relative)
    assert torch.allclose(moved.double(), naive(energy, before, rate, 3, relative), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, before, atol=1e-2)


def test_almost_equal_images_move_apart_and_equal_ones_stay():
    """Texts are almost equal in the first block, where they have just met the images."""
    before = features(alike=1e-4)
    moved = step_on_cosines(before, entropy_slope, 0.5, 4, GROUP.size, relative=True) - before
    expected = naive(entropy, before, 0.5, 4, relative=True) - before
    assert moved.abs().max() > 1e-3
    assert torch.allclose(moved.double(), expected, rtol=1e-3, atol=1e-5 * before.abs().max())
    equal = features()[:1].repeat(3, 1, 1)
    assert torch.allclose(step_on_cosines(equal, entropy_slope, 1.0, 5, GROUP.size, relative=True), equal, atol=1e-5)
    half = features().bfloat16()
    moved = step_on_cosines(half, entropy_slope, 0.5, 2, GROUP.size, relative=True)
    assert moved.dtype == torch.bfloat16
    assert torch.allclose(moved.float(), naive(entropy, half, 0.5, 2, True).float(), rtol=2**-7)


@pytest.fixture
def watched(tiny_flux):
    """Record two steps of a call, at 1000 and 500: `watched(method)` returns a list of blocks for each step.

    A block is its output (text, image), the (text, image) that the next block received, and its own inputs; nothing
    follows the last block.
    """
    blocks = [*tiny_flux.transformer.transformer_blocks, *tiny_flux.transformer.single_transformer_blocks]

    def watch(method):
        inputs, outputs = [], []
        with contextlib.ExitStack() as stack:
            for block in blocks:
                for handle in (
                    block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True),
                    block.register_forward_hook(lambda _, args, output: outputs.append(output)),
                ):
                    stack.callback(handle.remove)
            context = stack.enter_context(method.apply(tiny_flux, GROUP, CALLS["flux"]))
            sample(tiny_flux, GROUP, context.call)
        received = [(kwargs["encoder_hidden_states"], kwargs["hidden_states"]) for kwargs in inputs[1:]]
        steps = list(zip(outputs, [*received, None], inputs, strict=True))
        return steps[: len(blocks)], steps[len(blocks) :]

    return watch


def all_equal(blocks):
    return all(torch.equal(out[i], following[i]) for out, following, _ in blocks for i in (0, 1))


def test_feature_guidance_disperses_the_images_and_applies_the_block_again(watched, tiny_flux):
    method = FeatureGuidance("m", w=0.1, relative=True, n_opt=3, temperature=0.5, mix=0.3)
    first, second = watched(method)
    assert all_equal(first[:1]) and all_equal(first[2:-1]) and all_equal(second[:-1])
    out, following, inputs = first[1]
    assert torch.equal(following[0], out[0]), "the text goes on as the block left it"
    apart = naive(partial(similarity, temperature=0.5), out[1], -0.1, 3, relative=True).float()
    options = {key: inputs[key] for key in ("temb", "image_rotary_emb")}
    with torch.no_grad():
        block = tiny_flux.transformer.transformer_blocks[1]
        _, again = block(hidden_states=apart, encoder_hidden_states=out[0], **options)
    assert torch.allclose(following[1], 0.3 * again + 0.7 * apart, atol=1e-4)
    assert not torch.allclose(following[1], out[1], atol=1e-2)


def test_contextual_repulsion_moves_the_texts_and_in_single_stream_blocks_all_tokens(watched):
    method = ContextualRepulsion("m", eta=0.5, relative=True, inner_steps=3)
    first, second = watched(method)
    for (text, image), following, _ in first[:2]:
        assert torch.allclose(following[0].double(), naive(entropy, text, 0.5 / 3, 3, True), rtol=1e-3, atol=1e-3)
        assert torch.equal(following[1], image) and not torch.allclose(following[0], text, atol=1e-3)
    (text, image), following, _ = first[2]
    expected = naive(entropy, torch.cat([text, image], dim=1), 0.5 / 3, 3, True)
    assert torch.allclose(torch.cat(following, dim=1).double(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(following[1], image, atol=1e-3)
    assert all_equal(second[:-1])
    method.first_steps = 2
    _, second = watched(method)
    assert not torch.equal(second[0][0][0], second[0][1][0])


class FluxHeunScheduler(FlowMatchHeunDiscreteScheduler):
    """Heun's scheduler with the arguments that Flux's pipeline passes."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps or len(sigmas), device)


def test_contextual_repulsion_changes_both_halves_of_a_second_order_step(watched, tiny_flux):
    tiny_flux.scheduler = FluxHeunScheduler()
    first, rest = watched(ContextualRepulsion("m", eta=0.5, relative=True, inner_steps=3))
    second, third = rest[: len(first)], rest[len(first) :]
    assert not all_equal(first[:-1]) and not all_equal(second[:-1]), "two calls of the first step"
    assert all_equal(third[:-1]), "the call of the last step"
