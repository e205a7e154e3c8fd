"""Normalised attention guidance: its formula token by token, and the outputs of the attentions of a call."""

import contextlib
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from stand_ins import Finds
from test_methods import CALLS, PAIR

from experiments.methods.method import Baseline, sample
from experiments.methods.nag import NAG

OPTIONS = {"scale": 4.0, "tau": 1.2, "alpha": 0.6}


def method(name="a blue thing", **options):
    return NAG("m", Finds(name), **OPTIONS | options)


def naive(positive, negative, norm="L2"):
    """Apply the formula token by token."""
    order, rows = {"L1": 1, "L2": 2}[norm], []
    for wanted, unwanted in zip(positive.flatten(0, -2).tolist(), negative.flatten(0, -2).tolist(), strict=True):
        apart = [4.0 * p - 3.0 * n for p, n in zip(wanted, unwanted, strict=True)]
        length, longest = (sum(abs(x) ** order for x in token) ** (1 / order) for token in (apart, wanted))
        if length > 1.2 * longest:
            apart = [value / length * 1.2 * longest for value in apart]
        rows.append([0.6 * a + 0.4 * p for a, p in zip(apart, wanted, strict=True)])
    return torch.tensor(rows).view_as(positive)


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_the_formula(norm):
    positive, negative = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    negative[0] = 0.95 * positive[0]  # so that no token is too long
    assert torch.allclose(method(norm=norm).guide(positive, negative), naive(positive, negative, norm), atol=1e-5)
    assert method().guide(positive.half(), negative.half()).dtype == torch.float16
    assert torch.equal(method().guide(torch.zeros(1, 5), torch.zeros(1, 5)), torch.zeros(1, 5))


@pytest.fixture
def inputs_of(pipe, kind):
    """Record the inputs of modules in a call: `inputs_of(method, names)`.

    Returns, for each name, the inputs before the method's own hooks and those after them.
    """

    def record(chosen, names):
        denoiser = pipe.unet if kind == "sdxl" else pipe.transformer
        recorded = {name: ([], []) for name in names}
        with contextlib.ExitStack() as stack:

            def add(index):
                for name, lists in recorded.items():

                    def hook(_, args, kwargs, to=lists[index]):
                        to.append(kwargs | dict(enumerate(args)))

                    handle = denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)

            add(0)
            with chosen.apply(pipe, PAIR, CALLS[kind]) as context:
                add(1)
                sample(pipe, PAIR, context.call)
        return recorded

    return record


@pytest.mark.parametrize("kind", ["sdxl"], indirect=True)
def test_in_a_unet_the_conditional_half_of_cross_attentions_is_guided(pipe, inputs_of):
    name = next(name for name, _ in pipe.unet.named_modules() if name.endswith(".attn2"))
    attention = pipe.unet.get_submodule(name)
    recorded = inputs_of(method(), [name, f"{name}.to_out.0"])
    text = pipe.encode_prompt("a blue thing", device="cpu", do_classifier_free_guidance=False)[0]

    def attend(tokens, prompts):
        projected = (attention.to_q(tokens), attention.to_k(prompts), attention.to_v(prompts))
        query, key, value = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in projected)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    with torch.no_grad():
        for before, after in zip(recorded[name][0], recorded[f"{name}.to_out.0"][1], strict=True):
            tokens = before[0]
            unguided = attend(tokens, before["encoder_hidden_states"])
            expected = naive(unguided[2:], attend(tokens[2:], text.expand(2, -1, -1)))
            assert torch.allclose(after[0], torch.cat([unguided[:2], expected]), atol=1e-5)
            assert not torch.allclose(after[0], unguided, atol=1e-3)


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_in_flux_the_negative_text_runs_through_the_blocks_with_the_prompt(pipe, inputs_of):
    projections = [f"transformer_blocks.{number}.attn.to_out.0" for number in (0, 1)]
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    last = "single_transformer_blocks.1"
    outputs = []
    pipe.transformer.get_submodule(f"{last}.attn").register_forward_hook(lambda _, a, output: outputs.append(output))
    recorded = inputs_of(method(), [*projections, *blocks, "transformer_blocks.1.attn", f"{last}.proj_out"])
    for name in projections:
        for before, after in zip(*recorded[name], strict=True):
            expected = naive(*before[0].chunk(2))
            assert torch.allclose(after[0], torch.cat([expected, expected]), atol=1e-5)
            assert not torch.allclose(expected, before[0][:2], atol=1e-3)
    options = {"max_sequence_length": 16, "device": "cpu"}
    positive, negative = (pipe.encode_prompt(prompt, None, **options)[0] for prompt in (PAIR.prompt, "a blue thing"))
    with torch.no_grad():
        texts = pipe.transformer.context_embedder(torch.cat([positive, positive, negative, negative]))
    for inputs in recorded["transformer_blocks.0"][1]:
        assert torch.allclose(inputs["encoder_hidden_states"], texts, atol=1e-5)
        assert not torch.equal(*inputs["temb"].chunk(2)), "the pooled embeddings differ too"
    shared = {"transformer_blocks.1.attn": True, "single_transformer_blocks.0": True, last: False}
    for name, is_shared in shared.items():
        for inputs in recorded[name][1]:
            assert torch.equal(*inputs["hidden_states"].chunk(2)) is is_shared, name
    # In single-stream blocks, the images of both texts get the same; the projection's input begins with the
    # attention's output.
    for output, inputs in zip(outputs, recorded[f"{last}.proj_out"][1], strict=True):
        projected = inputs[0][..., : pipe.transformer.inner_dim]
        expected = naive(*output[:, 16:].chunk(2))
        assert torch.equal(projected[:, :16], output[:, :16])
        assert torch.allclose(projected[:, 16:], torch.cat([expected, expected]), atol=1e-5)


def test_without_another_text_or_concept_the_images_stay(pipe, kind):
    """With the prompt itself as the negative text, it is carried through the entire pipeline without any effect."""
    stock = Baseline().generate(pipe, PAIR, CALLS[kind]).images
    result = method(PAIR.prompt).generate(pipe, PAIR, CALLS[kind])
    assert np.allclose(result.images, stock, atol=1e-4) and result.references == {f"{PAIR.prompt}/1.png": 0.5}
    result = method(None).generate(pipe, PAIR, CALLS[kind])
    assert np.array_equal(result.images, stock) and result.references == {}


def test_it_ends_with_its_share_of_the_steps(kind, inputs_of):
    """The first of two steps is guided, at 501 and 1 for the UNet, at 1000 and 500 for Flux."""
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn2" if kind == "sdxl" else "transformer_blocks.0.attn"
    key, end = (0, 0.5) if kind == "sdxl" else ("hidden_states", 0.49)
    rows = {share: [len(inputs[key]) for inputs in inputs_of(method(end=share), [name])[name][1]] for share in (1, end)}
    both, one = (6, 4) if kind == "sdxl" else (4, 2)
    assert rows == {1: [both, both], end: [both, one]}


def test_another_architecture_is_refused():
    class SD3Transformer2DModel(torch.nn.Module):
        pass

    pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
    object.__setattr__(pipe, "transformer", SD3Transformer2DModel())
    context = method().apply(pipe, PAIR, {})
    with pytest.raises(ValueError, match=r"defined for Flux, SDXL and .*, got StableDiffusion3Pipeline"), context:
        pass
