"""Checkpoints are found, identified by content, and their absence is explained in seconds."""

import functools
import inspect
import json
import re
import shutil

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from experiments import PROJECT
from experiments.compose import composed
from experiments.configs import build
from experiments.runs import checkpoints

MODELS = sorted(file.stem for file in (PROJECT / "conf" / "model").glob("*.yaml"))
REAL = [name for name in MODELS if not name.startswith("mini-")]
METHODS = ("none", "negtome", "negtome_released", "negative_prompt", "negtome_reference", "random_match")


@functools.cache
def model_file(name):
    """Read a model's file and the one that it extends, without the domain. Not to be changed."""
    cfg = OmegaConf.load(PROJECT / "conf" / "model" / f"{name}.yaml")
    extended = [model_file(parent) for parent in cfg.pop("defaults") if parent in MODELS]
    return OmegaConf.merge(*extended, cfg)


def model(name, **changes):
    """Return a copy of a model's configuration: `model("sdxl", source=folder)`."""
    return OmegaConf.merge(model_file(name), {key: str(value) for key, value in changes.items()})


@pytest.mark.parametrize(("kind", "name"), [("sdxl", "sdxl"), ("flux", "flux-dev"), ("flux", "flux-schnell")])
def test_a_folder_in_the_real_layout_loads_with_the_stock_pipeline(kind, name, tiny_checkpoint):
    config = model(name, source=tiny_checkpoint(kind), dtype="float32")
    pipe = checkpoints.load(config, checkpoints.find_checkpoint(config), "cpu")
    assert type(pipe).__name__ == checkpoints.ARCHITECTURES[kind].pipeline
    assert next(pipe.vae.parameters()).dtype is torch.float32


def test_every_missing_file_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("sdxl"), tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.source=/path/to/folder") as error:
        checkpoints.find_checkpoint(model("sdxl", source=folder))
    missing = re.findall(r"^  missing: (\S+)", str(error.value), re.MULTILINE)
    assert missing == ["tokenizer_2/tokenizer_config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    (folder / "model_index.json").unlink()
    assert checkpoints.missing_files(folder, "sdxl") == ["model_index.json"], "which lists the other files"
    assert checkpoints.missing_files(tiny_checkpoint("flux"), "sdxl") == ["unet/config.json"], "of another architecture"


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("flux"), tmp_path / "copy")
    stem = str(folder / "transformer" / "diffusion_pytorch_model")
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shutil.move(f"{stem}.safetensors", folder / "transformer" / names[0])
    with open(f"{stem}.safetensors.index.json", "w") as index:
        json.dump({"weight_map": dict(zip("ab", names, strict=True))}, index)
    assert checkpoints.missing_files(folder, "flux") == [f"transformer/{names[1]}"]


def test_numbers_of_calls_have_the_types_that_diffusers_declares():
    declared = set()
    for architecture in checkpoints.ARCHITECTURES.values():
        call = inspect.signature(getattr(diffusers, architecture.pipeline).__call__)
        declared |= {n for n, argument in call.parameters.items() if re.search(r"\bfloat\b", str(argument.annotation))}
    assert declared == checkpoints.FLOATS


AUTOENCODERS = {
    "KL": {"block_out_channels": [128, 256, 512, 512]},
    "DC": {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    "Qwen": {"dim_mult": [1, 2, 4, 4]},
}


@pytest.fixture
def outline(tmp_path):
    """Lay down the components of a model without their weights: a denoiser and an autoencoder."""

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


def test_only_the_components_of_an_index_that_are_loaded_are_needed(outline):
    """Lists among its settings, switched-off components and weights of components without any are not missing."""
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


def test_every_call_is_one_that_its_pipeline_takes():
    for name in MODELS:
        config = model(name)
        pipeline = getattr(diffusers, checkpoints.ARCHITECTURES[config.architecture].pipeline)
        inspect.signature(pipeline.__call__).bind(None, prompt="a cat", **checkpoints.call_arguments(config))


def test_the_fingerprint_identifies_the_content_and_not_the_place(tiny_checkpoint, tmp_path):
    moved = shutil.copytree(tiny_checkpoint("sdxl"), tmp_path / "moved")
    before = checkpoints.fingerprint(tiny_checkpoint("sdxl"))
    assert checkpoints.fingerprint(moved) == before
    (moved / "negtome.json").write_text("{}")
    assert checkpoints.fingerprint(moved) == before, "it does not affect pixels"
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


def test_a_mistyped_folder_is_named():
    with pytest.raises(FileNotFoundError, match=r"^no folder models/nope: "):
        checkpoints.find_checkpoint(model("sdxl", source="models/nope"))


# --- models of conf/ --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def methods():
    return composed([f"+method@methods.{name}={name}" for name in METHODS]).methods


@pytest.fixture
def method_of(methods):
    """A method's configuration for a model: `method_of("sdxl", "negtome", blocks="early")`."""

    def of(name, method, **about):
        cfg = {"model": {key: model_file(name)[key] for key in ("name", "architecture")}, "retriever": {}}
        cfg = OmegaConf.create(cfg | {"method": methods[method], "older_protocol": False})
        cfg.method.metadata.update(about)
        return cfg.method

    return of


def test_every_model_goes_with_every_method(method_of):
    for model in MODELS:
        for name in METHODS:
            assert OmegaConf.to_container(method_of(model, name), resolve=True)["name"] == name
        method = build(method_of(model, "negtome"))
        assert method.config.sites is None
        few_steps = ("mini-flux-schnell", "flux-schnell", "flux2-klein-4b", "krea2-turbo", "z-image-turbo")
        alpha = dict.fromkeys(few_steps, 0.45) | {"mini-sdxl": 1.35}
        assert (method.config.alpha, method.config.reference) == (alpha.get(model, 0.9), "first")
        assert build(method_of(model, "negtome_released")).config.matching == "released"


def test_an_unknown_choice_of_blocks_is_refused_and_the_known_ones_are_named(method_of):
    assert method_of("sdxl", "negtome", blocks="early").sites == ["up_blocks.0"]
    for model, choices in (("sd3.5-large", r"\['release'\]"), ("sdxl", r"\['all', 'early', 'late', 'release'\]")):
        with pytest.raises(InterpolationResolutionError, match=f"one of {choices} for model={model}, got 'erly'"):
            _ = method_of(model, "negtome", blocks="erly").sites


def test_without_weights_and_network_the_message_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in REAL:
        config = model(name)
        with pytest.raises(FileNotFoundError, match=f"hf download {config.source}") as error:
            checkpoints.find_checkpoint(config)
        message = str(error.value)
        assert "model_index.json" in message and ("gated" in message) == ("gated" in config.licence[config.source])


def test_the_documentation_lists_the_real_models_as_they_are_configured(method_of):
    expected = []
    for name in REAL:
        config, method = model(name), method_of(name, "negtome")
        timesteps = f"{method.timestep_range[1]} to {method.timestep_range[0]}" if method.timestep_range else "none"
        if method.step_range is not None:
            assert method.step_range == [0, 0]
            timesteps = "none; first step"
        scale = config.call.true_cfg_scale if config.call.guidance_scale is None else config.call.guidance_scale
        cells = [
            f"`{name}`",
            config.source,
            config.licence[config.source],
            f"{config.call.num_inference_steps}, {scale:g}",
        ]
        expected.append(" | ".join([*cells, timesteps]))
    lines = (PROJECT / "docs" / "running.md").read_text().splitlines()
    rows = [re.sub(" +", " ", line).strip("| ") for line in lines if line.startswith("| `") and "`model=`" not in line]
    assert sorted(rows) == sorted(expected)
