"""Pipelines of random weights have the published sizes, and stand in for real ones in every call that is timed."""

import pytest
import torch
from omegaconf import OmegaConf

import negtome
from experiments import PROJECT
from experiments.latency.random_weights import build_pipeline, embeddings

PUBLISHED = OmegaConf.load(PROJECT / "conf" / "experiment" / "latency.yaml").latency.random
SMALLER = {
    "sdxl": {
        "modules": {
            "unet": {
                "sample_size": 16, "block_out_channels": [32, 64, 64], "transformer_layers_per_block": [1, 1, 1],
                "attention_head_dim": [2, 4, 4], "cross_attention_dim": 16, "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
        },
        "embeddings": {
            "prompt_embeds": [77, 16], "pooled_prompt_embeds": [32], "negative_prompt_embeds": [77, 16],
            "negative_pooled_prompt_embeds": [32],
        },
    },
    "flux": {
        "modules": {
            "transformer": {
                "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                "axes_dims_rope": [4, 4, 8],
            },
            "vae": {"latent_channels": 4},
        },
        "embeddings": {"prompt_embeds": [512, 32], "pooled_prompt_embeds": [32]},
    },
}  # fmt: skip
TINY = OmegaConf.merge(PUBLISHED, SMALLER)


@pytest.mark.parametrize(
    ("architecture", "denoiser", "dtype", "parameters"),
    [("sdxl", "unet", torch.float16, 2_567_463_684), ("flux", "transformer", torch.bfloat16, 11_901_408_320)],
)
def test_the_denoisers_have_the_published_number_of_parameters(architecture, denoiser, dtype, parameters):
    module = getattr(build_pipeline(PUBLISHED[architecture], "meta", dtype), denoiser)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("given", [False, True], ids=["group", "picture"])
@pytest.mark.parametrize("architecture", TINY)
def test_a_call_with_embeddings_runs_without_text_encoders(architecture, given):
    pipe = build_pipeline(TINY[architecture], "cpu", torch.float32)
    assert pipe.text_encoder is None and pipe.text_encoder_2 is None
    call = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent"}
    call |= embeddings(pipe, TINY[architecture], 2, 5)
    call |= {"max_sequence_length": 5} if architecture == "flux" else {}
    config = negtome.NegToMeConfig(threshold=-1, min_side=4, timestep_range=(0, 1000))
    picture = negtome.Reference(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))) if given else None
    with negtome.attach(pipe, config, references=picture) as attached:
        images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2 and images.isfinite().all()
    summary = attached.summary()
    assert summary["tokens_pushed"] == summary["tokens_compared"] > 0


def test_the_embeddings_are_of_the_published_shapes_and_always_the_same():
    pipe = build_pipeline(TINY.sdxl, "cpu", torch.float32)
    found, again = (embeddings(pipe, TINY.sdxl, 3) for _ in range(2))
    assert found.pop("num_images_per_prompt") == 1
    assert {name: list(value.shape) for name, value in found.items()} == {
        name: [3, *shape] for name, shape in TINY.sdxl.embeddings.items()
    }
    assert all(torch.equal(value, again[name]) and (value == value[:1]).all() for name, value in found.items())
