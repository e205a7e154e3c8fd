"""The naive transcription generates the same images as the library: the latency table compares equal methods."""

import contextlib

import pytest
import torch

import negtome
from experiments.methods import naive

CALLS = {
    "sdxl": {"height": 32, "width": 32, "guidance_scale": 5.0},
    "flux": {"height": 32, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 16},
}
#: In the middle of the tiny pipelines' similarities: some tokens move, some do not.
THRESHOLDS = {"sdxl": 0.95, "flux": 0.6}


def images(pipe, kind, context):
    with context:
        return pipe(
            "a dog", num_images_per_prompt=3, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0), **CALLS[kind],
        ).images  # fmt: skip


@pytest.mark.parametrize(("matching", "timesteps"), [("paper", (500, 1000)), ("released", (0, 1000))])
def test_the_transcription_and_the_library_make_the_same_images(kind, pipe, matching, timesteps):
    """In float64: the two round differently, and among similar features another match soon changes the image."""
    pipe.to(torch.float64)
    config = negtome.NegToMeConfig(
        alpha=0.5, threshold=THRESHOLDS[kind], matching=matching, cross_attention=True, min_side=8,
        timestep_range=timesteps,
    )  # fmt: skip
    stock = images(pipe, kind, contextlib.nullcontext())
    attached = negtome.attach(pipe, config)
    expected = images(pipe, kind, attached)
    transcribed = images(pipe, kind, naive.attach(pipe, config))

    summary = attached.summary()
    assert 0 < summary["tokens_pushed"] < summary["tokens_compared"]
    assert torch.equal(transcribed[0], stock[0]) and not torch.allclose(transcribed[1:], stock[1:], atol=1e-2)
    assert torch.allclose(transcribed, expected, rtol=0, atol=1e-9)
    assert torch.equal(images(pipe, kind, contextlib.nullcontext()), stock)


def test_every_call_counts_its_own_steps(kind, pipe):
    config = negtome.NegToMeConfig(alpha=2, threshold=-1, step_range=(0, 0), min_side=8)
    stock = images(pipe, kind, contextlib.nullcontext())
    with naive.attach(pipe, config):
        first, second = (images(pipe, kind, contextlib.nullcontext()) for _ in range(2))
    assert not torch.equal(first, stock) and torch.equal(second, first)


def test_its_hooks_are_removed_and_other_references_are_refused(tiny_sdxl):
    with pytest.raises(ZeroDivisionError), naive.attach(tiny_sdxl, negtome.NegToMeConfig(min_side=8)):
        assert any(module._forward_hooks for module in tiny_sdxl.unet.modules())
        _ = 1 / 0
    modules = list(tiny_sdxl.unet.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    attached = naive.attach(tiny_sdxl, negtome.NegToMeConfig(reference="others"))
    with pytest.raises(ValueError, match="transcription is of reference=\"first\", got 'others'"), attached:
        pass
