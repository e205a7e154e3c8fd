"""Normalised attention guidance: its formula token by token, and what the attentions of a call really gave."""

import math

import numpy as np
import pytest
import torch
from stand_ins import Finds
from test_methods import CALLS

from experiments.methods.method import Baseline, sample
from experiments.methods.nag import NAG
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 2)
OPTIONS = {"scale": 4.0, "tau": 1.2, "alpha": 0.6}


def method(name="a blue thing", **options):
    return NAG("m", Finds(name), **OPTIONS | options)


def guided(positive, negative, norm="L2"):
    """The formula, of one token after the other."""
    found = []
    for wanted, unwanted in zip(positive.flatten(0, -2).tolist(), negative.flatten(0, -2).tolist(), strict=True):
        apart = [4.0 * p - 3.0 * n for p, n in zip(wanted, unwanted, strict=True)]
        long, longest = (
            sum(map(abs, token)) if norm == "L1" else math.sqrt(sum(value**2 for value in token))
            for token in (apart, wanted)
        )
        if long > 1.2 * longest:
            apart = [value / long * 1.2 * longest for value in apart]
        found.append([0.6 * a + 0.4 * p for a, p in zip(apart, wanted, strict=True)])
    return torch.tensor(found).view_as(positive)


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_the_formula(norm):
    positive, negative = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    negative[0] = 0.95 * positive[0]  # where nothing is too long
    found = method(norm=norm).guide(positive, negative)
    assert torch.allclose(found, guided(positive, negative, norm), atol=1e-5)
    assert method().guide(positive.half(), negative.half()).dtype == torch.float16
    assert torch.equal(method().guide(torch.zeros(1, 5), torch.zeros(1, 5)), torch.zeros(1, 5))


@pytest.fixture
def into(pipe, kind):
    """What modules get in a call, and after the method's own hooks: `into(method, names)` returns both, by name."""

    def watch(chosen, names, group=GROUP):
        denoiser = pipe.unet if kind == "sdxl" else pipe.transformer
        found = {name: ([], []) for name in names}
        hooks = []

        def add(place):
            for name, lists in found.items():
                module = denoiser.get_submodule(name)
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, to=lists[place]: to.append(kwargs | dict(enumerate(args))),
                        with_kwargs=True,
                    )
                )

        add(0)
        with chosen.apply(pipe, group, CALLS[kind]) as applied:
            add(1)
            sample(pipe, group, applied.call)
        for hook in hooks:
            hook.remove()
        return found

    return watch


def heads(attention, x):
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("kind", ["sdxl"], indirect=True)
def test_in_a_unet_the_conditional_half_of_cross_attentions_is_guided(pipe, into):
    name = next(name for name, _ in pipe.unet.named_modules() if name.endswith(".attn2"))
    attention = pipe.unet.get_submodule(name)
    found = into(method(), [name, f"{name}.to_out.0"])
    text = pipe.encode_prompt("a blue thing", device="cpu", do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        for asked, (got,) in zip(found[name][0], map(lambda x: (x,), found[f"{name}.to_out.0"][1]), strict=True):
            tokens, prompts = asked[0], asked["encoder_hidden_states"]

            def attend(tokens, prompts):
                query, key, value = (
                    heads(attention, project(x))
                    for project, x in zip(
                        (attention.to_q, attention.to_k, attention.to_v), (tokens, prompts, prompts), strict=True
                    )
                )
                weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
                return (weights @ value).transpose(1, 2).flatten(2)

            plain = attend(tokens, prompts)
            wanted = guided(plain[2:], attend(tokens[2:], text.expand(2, -1, -1)))
            assert torch.allclose(got[0], torch.cat([plain[:2], wanted]), atol=1e-5)
            assert not torch.allclose(got[0], plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_in_flux_the_negative_text_runs_beside_the_prompt(pipe, into):
    projections = [f"transformer_blocks.{number}.attn.to_out.0" for number in (0, 1)]
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"]
    found = into(method(), [*projections, *blocks, "transformer_blocks.1.attn"])
    for name in projections:
        for before, after in zip(*found[name], strict=True):
            wanted = guided(*before[0].chunk(2))
            assert torch.allclose(after[0], torch.cat([wanted, wanted]), atol=1e-5)
            assert not torch.allclose(wanted, before[0][:2], atol=1e-3)
    options = {"max_sequence_length": 16, "device": "cpu"}
    embeds = [pipe.encode_prompt(prompt, None, **options)[0] for prompt in (GROUP.prompt, "a blue thing")]
    with torch.no_grad():
        texts = pipe.transformer.context_embedder(torch.cat([embeds[0], embeds[0], embeds[1], embeds[1]]))
    for asked in found["transformer_blocks.0"][1]:
        assert torch.allclose(asked["encoder_hidden_states"], texts, atol=1e-5)
        assert torch.equal(*asked["temb"].chunk(2)) is False, "pooled, the two differ too"
    for name, together in (("transformer_blocks.1.attn", True), ("single_transformer_blocks.0", True),
                           ("single_transformer_blocks.1", False)):  # fmt: skip
        for asked in found[name][1]:
            assert torch.equal(*asked["hidden_states"].chunk(2)) is together, name


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_in_single_stream_blocks_the_images_of_both_texts_get_the_same(pipe, into):
    """The attention's output is what the projection gets first, before the other branch."""
    name, width = "single_transformer_blocks.1", pipe.transformer.inner_dim
    computed = []
    hook = pipe.transformer.get_submodule(f"{name}.attn").register_forward_hook(lambda _, a, out: computed.append(out))
    found = into(method(), [f"{name}.proj_out"])[f"{name}.proj_out"][1]
    hook.remove()
    for raw, asked in zip(computed, found, strict=True):
        got = asked[0][..., :width]
        assert torch.equal(got[:, :16], raw[:, :16])
        wanted = guided(*raw[:, 16:].chunk(2))
        assert torch.allclose(got[:, 16:], torch.cat([wanted, wanted]), atol=1e-5)


def test_away_from_the_prompt_itself_there_is_nowhere_to_go(pipe, kind):
    """The negative text then gives what the prompt gives; in the whole pipeline, it is carried along rightly."""
    with method(GROUP.prompt).apply(pipe, GROUP, CALLS[kind]) as applied:
        made = sample(pipe, GROUP, applied.call)
    assert np.allclose(made, sample(pipe, GROUP, CALLS[kind]), atol=1e-4)
    assert applied.references == {f"{GROUP.prompt}/1.png": 0.5}


def test_no_asset_no_change(pipe, kind):
    made = method(None).generate(pipe, GROUP, CALLS[kind])
    assert np.array_equal(made.images, Baseline().generate(pipe, GROUP, CALLS[kind]).images) and made.references == {}


def test_it_ends_with_its_share_of_the_way(kind, into):
    """Of two steps, at 501 and 1 for the UNet, at 1000 and 500 for Flux, the first."""
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn2" if kind == "sdxl" else "transformer_blocks.0.attn"
    key, end = (0, 0.5) if kind == "sdxl" else ("hidden_states", 0.49)
    rows = {share: [len(asked[key]) for asked in into(method(end=share), [name])[name][1]] for share in (1.0, end)}
    both, one = (6, 4) if kind == "sdxl" else (4, 2)
    assert rows == {1.0: [both, both], end: [both, one]}


def test_what_is_left_out_is_as_published():
    settings = NAG("m", Finds("a blue thing"), scale=None).settings()
    assert (settings["scale"], settings["tau"], settings["alpha"], settings["end"]) == (5.0, 2.5, 0.25, 1.0)
    assert settings["retriever"] == {"finds": "a blue thing"}


def test_another_architecture_is_refused():
    from diffusers import StableDiffusion3Pipeline

    class SD3Transformer2DModel(torch.nn.Module):
        pass

    pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
    object.__setattr__(pipe, "transformer", SD3Transformer2DModel())
    applied = method().apply(pipe, GROUP, {})
    with pytest.raises(ValueError, match=r"defined for Flux, SDXL and .*, got StableDiffusion3Pipeline"), applied:
        pass
