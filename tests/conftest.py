"""Tiny real pipelines with random weights, shared by all tests: no downloads, and a call takes a fraction of a second.

They prove the plumbing, and nothing about what the method does to pictures.
"""

import copy
import gc
import os
import re
import string
from collections import OrderedDict

# Before anything imports huggingface_hub: a missing file must fail at once, not after minutes of retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Examples of a property that sets no number of its own: a quarter of the usual number.
settings.register_profile("short", max_examples=25)
settings.load_profile("short")


def pytest_collection_finish():
    """Have the garbage collector leave out what the tests imported, half a million objects that stay anyway.

    And look less often at what they make: composing and calling pipelines makes many objects in no circle,
    and going over them took a sixth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def _tiny_pipelines():
    return {"sdxl": _build_sdxl(), "flux": _build_flux(guidance=True), "flux-schnell": _build_flux(guidance=False)}


def _own(pipe):
    """Copy a pipeline. Its modules' empty tables, of hooks above all, take half of the time, and are made anew."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    tables = [x for module in modules for x in vars(module).values() if type(x) is OrderedDict and not x]
    return copy.deepcopy(pipe, {id(table): OrderedDict() for table in tables})


@pytest.fixture
def tiny_sdxl(_tiny_pipelines):
    """A StableDiffusionXLPipeline of its own: 32x32 pixels, attention on feature maps of 16x16 and 8x8 tokens."""
    return _own(_tiny_pipelines["sdxl"])


@pytest.fixture
def tiny_flux(_tiny_pipelines):
    """A FluxPipeline of its own, as FLUX.1-dev (guidance embedded): 32x32 pixels, 8x8 image tokens."""
    return _own(_tiny_pipelines["flux"])


@pytest.fixture
def tiny_schnell(_tiny_pipelines):
    """A FluxPipeline of its own, as FLUX.1-schnell (no guidance)."""
    return _own(_tiny_pipelines["flux-schnell"])


@pytest.fixture(params=["sdxl", "flux"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, request):
    """The tiny pipeline of a kind, for what holds for all of them."""
    return request.getfixturevalue(f"tiny_{kind}")


@pytest.fixture(scope="session")
def tiny_checkpoint(_tiny_pipelines, tmp_path_factory):
    """Lay a tiny checkpoint down in the layout of the real ones: `tiny_checkpoint("sdxl")`.

    Kinds are "sdxl", "flux" (dev) and "flux-schnell"; options go to `save_pretrained`, such as variant="fp16".
    Returns the folder, which is shared: copy it before changing it.
    """
    folders = {}

    def lay_down(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            _tiny_pipelines[kind].save_pretrained(folders[key], **options)
        return folders[key]

    return lay_down


@pytest.fixture(scope="session")
def tiny_overrides(tiny_checkpoint):
    """Overrides of an experiment on a tiny checkpoint, small: `tiny_overrides("sweep", folder, "method=none")`.

    Two prompts, two images, two steps, every token pushed; scores without an encoder; outputs and results in `folder`.
    Changes replace what they name, or are added. Kinds are "sdxl" and "flux" (dev).
    """

    def overrides(experiment, folder, *changes, kind="sdxl"):
        side, own = (16, "model.call.max_sequence_length=32") if kind == "flux" else (32, "method.min_side=4")
        usual = [
            f"model={'flux-dev' if kind == 'flux' else 'sdxl'}", f"model.source={tiny_checkpoint(kind)}",
            "model.dtype=float32", "model.call.num_inference_steps=2", f"model.call.height={side}",
            f"model.call.width={side}", own, "method.timestep_range=[0,1000]", "method.threshold=-1",
            "method.alpha=0.9", "model.groups_per_category=1", "prompts.categories=[flower,fruit]",
            "prompts.images_per_prompt=2", "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score",
            "primary.diversity=pairwise_distance", "primary.quality=vendi_score", "bootstrap.n_resamples=100",
            f"outputs={folder / 'outputs'}", f"results={folder / 'results'}",
        ]  # fmt: skip
        if "method=none" in changes:  # which has no settings
            usual = [one for one in usual if not one.startswith("method.")]
        return list({one.partition("=")[0]: one for one in (f"experiment={experiment}", *usual, *changes)}.values())

    return overrides


@pytest.fixture(scope="session")
def tabulated():
    """Score what was generated: `tabulated(plan)` returns the table's files, as text, and every image's bytes."""
    from eval.images import read_manifest
    from experiments import tabulate
    from experiments.evaluate import evaluate
    from experiments.runs.store import Run

    def table(plan):
        evaluate(plan)
        tabulate.write_table(plan)
        runs = [Run.of(spec) for spec in plan.runs]
        # Whoever commits while this runs changes nothing that is tested here.
        commits = "|".join(re.escape(run.environment["commit"]) for run in runs)
        files = {
            path.name: re.sub(commits, "commit", path.read_text())
            for path in sorted(plan.result_file().parent.glob("table.*"))
        }
        images = [(run.folder / row.path).read_bytes() for run in runs for row in read_manifest(run.folder)]
        return files, images

    return table


def _clip_tokenizer():
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())  # no merges: every character is a token
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -3.0) for c in string.printable if not c.isspace()]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


def _clip_config(tokenizer):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
    )


def _vae(latent_channels, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        sample_size=32,
        **options,
    )


def _build_sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.data *= 8  # else attention averages over everything, and all of its outputs are alike
    tokenizer = _clip_tokenizer()
    config = _clip_config(tokenizer)
    pipe = StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_flux(guidance):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.data *= 3  # else attention averages over everything, and all of its outputs are alike
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(1, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
