"""Settings and files that would lead to a meaningless number are refused, in a line that says what was expected."""

import functools
import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from plans import plan_from
from safetensors.torch import load_file, save_file

from eval.attributes import AttributeEntropy
from eval.clip import HFClip
from eval.encoders import PixelEncoder
from experiments import PROJECT
from experiments.compose import expand
from experiments.configs import build
from experiments.generate import generate
from experiments.prompts import CharacterPrompts
from experiments.runs import checkpoints
from experiments.runs.identity import request
from experiments.runs.metrics import build_metric
from experiments.runs.workers import _to_pil


@pytest.fixture(scope="module")
def composed(tiny_overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    return functools.cache(lambda kind: expand(tiny_overrides("sweep", folder, "method=none", kind=kind))[0])


@pytest.fixture
def configure(composed, tmp_path):
    """Change a tiny experiment's configuration: `configure({"model.call.width": 65}, kind="flux")`."""

    def changed(changes, kind="sdxl"):
        cfg = OmegaConf.create(OmegaConf.to_container(composed(kind), resolve=True))
        for key, value in {"outputs": str(tmp_path / "outputs"), **changes}.items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return changed


@pytest.fixture
def weights(tiny_checkpoint, tmp_path):
    """A copy of a tiny checkpoint, to be damaged: `weights("flux")`."""
    return lambda kind="sdxl": shutil.copytree(tiny_checkpoint(kind), tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        ("sdxl", "denoiser"),
        ("flux", "vae"),
        pytest.param("sdxl", "vae", marks=pytest.mark.slow),
        pytest.param("flux", "denoiser", marks=pytest.mark.slow),
    ],
)
def test_images_that_are_not_finite_are_never_saved(kind, component, configure, weights):
    folder = weights(kind)
    name = component if component == "vae" else {"sdxl": "unet", "flux": "transformer"}[kind]
    file = folder / name / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(("conv_out.weight", "proj_out.weight")))
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, file, {"format": "pt"})
    cfg = configure({"model.source": str(folder)}, kind)
    with pytest.raises(ValueError, match=rf"finite images of model={cfg.model.name} in float32, got NaN"):
        generate(plan_from(cfg))
    assert not list((folder.parent / "outputs").rglob("*.png"))


def test_half_precision_is_named_as_a_possible_cause(tiny_sdxl):
    model = OmegaConf.create({"name": "sdxl", "dtype": "float16"})
    with pytest.raises(ValueError, match=r"overflows in float16: give model\.dtype=float32"):
        _to_pil(tiny_sdxl, torch.full((1, 8, 8, 3), float("nan")).numpy(), model)


@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("sdxl", "tokenizer"), ("sdxl", "tokenizer_2"), ("flux", "tokenizer_2")]
)
def test_a_checkpoint_without_a_vocabulary_is_incomplete(kind, tokenizer, weights):
    folder = weights(kind)
    vocabulary = folder / tokenizer / "tokenizer.json"
    content = json.loads(vocabulary.read_text())["model"]
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        (folder / tokenizer / name).unlink(missing_ok=True)
    assert checkpoints.missing_files(folder, kind) == [f"{tokenizer}/tokenizer.json"]
    if kind == "sdxl":  # whose vocabulary may also be in two files
        (folder / tokenizer / "vocab.json").write_text(json.dumps(content["vocab"]))
        (folder / tokenizer / "merges.txt").write_text("#version: 0.2\n")
        assert not checkpoints.missing_files(folder, kind)


def test_a_scorer_without_a_vocabulary_or_with_damaged_weights_is_named(tmp_path):
    folder = shutil.copytree(PROJECT / "models" / "mini-clip", tmp_path / "clip")
    assert HFClip(folder).weights().present
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"weights of clip in .* cannot be loaded .*into {folder} or give another"):
        HFClip(folder).prepare()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the weights of clip \(tokenizer\.json\)"):
        HFClip(folder).prepare()


@pytest.mark.parametrize(
    ("kind", "name", "value", "multiple"),
    [
        ("sdxl", "height", 0, 2), ("sdxl", "width", 65, 2), ("sdxl", "height", -64, 2), ("sdxl", "width", True, 2),
        ("flux", "height", 18, 4), ("flux", "height", 0, 4), ("sdxl", "num_inference_steps", 0, 1),
        ("sdxl", "num_inference_steps", 2.5, 1),
    ],
)  # fmt: skip
def test_a_size_that_the_model_does_not_support_is_refused(kind, name, value, multiple, configure):
    message = rf"model\.call\.{name} must be a positive multiple of {multiple} for .*got {value}"
    with pytest.raises(ValueError, match=message):
        generate(plan_from(configure({f"model.call.{name}": value}, kind)))


def test_sizes_of_the_configured_models_are_supported(configure, with_model):
    for name in ("mini-sdxl", "mini-flux"):
        checkpoints.find_checkpoint(with_model(name).model)
    checkpoints.find_checkpoint(configure({"model.call.height": None, "model.call.width": 66}).model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts.categories": "bird"},
            r"categories must be a list, got .*: give prompts\.categories=\[bird\]",
        ),
        ({"prompts.templates": "a"}, r"prompts\.templates must be a list, got .*: give prompts\.templates=\[a\]"),
        ({"prompts.seeds": 3}, r"prompts\.seeds must be a list, got .*: give prompts\.seeds=\[3\]"),
        ({"prompts.images_per_prompt": "4"}, "images_per_prompt must be a whole number of at least 2, got '4'"),
        ({"model.dtype": "float31"}, r"model\.dtype must name a torch dtype"),
        *(({"compile": value}, f"compile must be true or false, got .*{value}") for value in ("no", "off", 0, "false")),
    ],
)
def test_a_value_of_another_type_is_refused(change, message, configure):
    with pytest.raises(ValueError, match=message):
        cfg = configure(change)
        request(cfg, build(cfg.method))


def test_a_text_is_no_list_of_letters_and_no_truth(configure, tabulated):
    with pytest.raises(ValueError, match=r"prompts\.characters\.ogre\.direct must be a list, got 'an ogre'"):
        CharacterPrompts("x", "test", {"ogre": {"direct": "an ogre"}}, (0,), 2)
    with pytest.raises(ValueError, match=r"prompts\.kinds must be a list, got 'direct'"):
        CharacterPrompts("x", "test", {"ogre": {"direct": ["an ogre"]}}, (0,), 2, kinds="direct")
    cfg = configure({"metric.vendi_score.only": "direct-*", "images": str(PROJECT)})
    with pytest.raises(ValueError, match=r"only must be a list of patterns, got 'direct-\*'"):
        build_metric(cfg, "vendi_score")
    with pytest.raises(ValueError, match="expected a list of labels"):
        AttributeEntropy(PixelEncoder(), {"bird": "owl"})
    with pytest.raises(ValueError, match="offload must be true or false, got 'no'"):
        generate(plan_from(configure({"offload": "no"})))
    (cfg,) = expand(["experiment=copyright", "model=mini-sdxl", "method=negtome_reference", "method.masks=no"])
    with pytest.raises(ValueError, match=r"method\.masks must be true or false, got 'no'"):
        build(cfg.method)
    plan = plan_from(configure({"report_seconds": "no"}))
    generate(plan)
    with pytest.raises(ValueError, match="report_seconds must be true or false, got 'no'"):
        tabulated(plan)
