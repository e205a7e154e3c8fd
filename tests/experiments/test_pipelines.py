"""Checkpoints are found, identified by content, and their absence is explained in seconds."""

import inspect
import json
import re
import shutil

import diffusers
import pytest
import torch

from experiments import PROJECT
from experiments.plan import expand
from experiments.runs import checkpoints


def model(name, **changes):
    return expand([f"model={name}", *(f"model.{key}={value}" for key, value in changes.items())])[0].model


@pytest.mark.parametrize(("kind", "name"), [("sdxl", "sdxl"), ("flux", "flux-dev"), ("flux", "flux-schnell")])
def test_a_folder_in_the_real_layout_loads_with_the_stock_pipeline(kind, name, tiny_checkpoint):
    config = model(name, source=tiny_checkpoint(kind), dtype="float32")
    checkpoint = checkpoints.find_checkpoint(config)
    pipe = checkpoints.load(config, checkpoint, "cpu")
    assert type(pipe).__name__ == checkpoints.ARCHITECTURES[kind].pipeline
    assert next(pipe.vae.parameters()).dtype is torch.float32


def test_every_missing_file_is_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("sdxl"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.find_checkpoint(model("sdxl", source=folder))
    missing = ["tokenizer_2/tokenizer_config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    lines = str(error.value).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  missing: ")] == missing
    assert "model.source=/path/to/folder" in str(error.value)
    (folder / "model_index.json").unlink()
    assert checkpoints.missing_files(folder, "sdxl") == ["model_index.json"], "which says what else there is to be"


def test_another_architectures_checkpoint_is_incomplete(tiny_checkpoint):
    assert checkpoints.missing_files(tiny_checkpoint("flux"), "sdxl") == ["unet/config.json"]


def test_numbers_of_calls_have_the_types_that_diffusers_declares():
    declared = set()
    for architecture in checkpoints.ARCHITECTURES.values():
        call = inspect.signature(getattr(diffusers, architecture.pipeline).__call__)
        declared |= {n for n, argument in call.parameters.items() if re.search(r"\bfloat\b", str(argument.annotation))}
    assert declared == checkpoints.FLOATS


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("flux"), folder)
    transformer = folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").rename(
        transformer / "diffusion_pytorch_model-00001-of-00002.safetensors"
    )
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoints.missing_files(folder, "flux") == [
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    ]


AUTOENCODERS = {
    "KL": {"block_out_channels": [128, 256, 512, 512]},
    "DC": {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    "Qwen": {"dim_mult": [1, 2, 4, 4]},
}


@pytest.fixture
def outline(tmp_path):
    """A folder of a model's parts without content, as they are named: those of the denoiser and of an autoencoder."""

    def lay_down(denoiser, autoencoder, **more):
        index = {denoiser: ["diffusers", "Denoiser"], "vae": ["diffusers", f"Autoencoder{autoencoder}"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index | more))
        for name, config in ((denoiser, {}), ("vae", AUTOENCODERS[autoencoder])):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(config))
            (tmp_path / name / "diffusion_pytorch_model.safetensors").touch()
        return tmp_path

    return lay_down


@pytest.mark.parametrize(
    ("name", "autoencoder", "multiple"),
    [("sd15", "KL", 8), ("sd3.5-large", "KL", 16), ("sana", "DC", 32), ("qwen-image", "Qwen", 16)],
)
def test_a_size_that_the_pipeline_would_round_is_refused(name, autoencoder, multiple, outline):
    config = model(name)
    config.source = str(outline(checkpoints.ARCHITECTURES[config.architecture].denoiser, autoencoder))
    assert checkpoints.find_checkpoint(config).fingerprint
    config.call.width += multiple
    checkpoints.find_checkpoint(config)
    config.call.width += multiple // 2
    with pytest.raises(ValueError, match=rf"width must be a positive multiple of {multiple} for model={name}"):
        checkpoints.find_checkpoint(config)


def test_of_an_index_the_components_are_wanted_that_are_loaded(outline):
    """And neither lists among its settings, nor what is switched off, nor the weights of what has none."""
    layers, none = {"text_encoder_select_layers": [2, 5, 8], "patch_sizes": [2, 2]}, {"image_encoder": [None, None]}
    checker = {"safety_checker": ["stable_diffusion", "Checker"], "feature_extractor": ["transformers", "Extractor"]}
    folder = outline("unet", "KL", processor=["transformers", "PixtralProcessor"], **layers, **none, **checker)
    assert checkpoints.missing_files(folder, "sd15") == ["processor/preprocessor_config.json"]
    (folder / "processor").mkdir()
    (folder / "processor" / "processor_config.json").write_text("{}")
    before = checkpoints.fingerprint(folder)
    assert not checkpoints.missing_files(folder, "sd15")
    (folder / "processor" / "chat_template.jinja").write_text("{{ prompt }}")
    assert checkpoints.fingerprint(folder) != before


def test_every_call_is_one_that_its_pipeline_takes(with_model):
    for name in (file.stem for file in (PROJECT / "conf" / "model").glob("*.yaml")):
        config = with_model(name).model
        pipeline = getattr(diffusers, checkpoints.ARCHITECTURES[config.architecture].pipeline)
        inspect.signature(pipeline.__call__).bind(None, prompt="a cat", **checkpoints.call_arguments(config))


def test_the_fingerprint_is_the_contents_and_not_the_places(tiny_checkpoint, tmp_path):
    original = tiny_checkpoint("sdxl")
    moved = tmp_path / "moved"
    shutil.copytree(original, moved)
    before = checkpoints.fingerprint(original)
    assert checkpoints.fingerprint(moved) == before
    (moved / "negtome.json").write_text("{}")
    assert checkpoints.fingerprint(moved) == before, "published runs are named by it, and it says nothing of pixels"
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoints.fingerprint(moved) != before


def test_an_unknown_dtype_or_architecture_is_refused(tiny_checkpoint):
    config = model("sdxl", source=tiny_checkpoint("sdxl"), dtype="half_precision")
    with pytest.raises(ValueError, match="half_precision"):
        checkpoints.load(config, checkpoints.find_checkpoint(config), "cpu")
    with pytest.raises(ValueError, match=r"architecture must be one of .*'dit'"):
        checkpoints.find_checkpoint(model("sdxl", architecture="dit"))
