"""What would become a number that means nothing is refused, in one line that says what was expected."""

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
from experiments.evaluate import configured_metrics
from experiments.generate import generate
from experiments.plan import RunSpec, expand
from experiments.prompts import CharacterPrompts
from experiments.runs import checkpoints
from experiments.runs.store import Run, request


@pytest.fixture
def asked(tmp_path, tiny_overrides):
    def configure(*changes, kind="sdxl", experiment="sweep"):
        (cfg, *_) = expand([*tiny_overrides(experiment, tmp_path, "method=none", kind=kind), *changes])
        return cfg

    return configure


@pytest.fixture
def weights(tiny_checkpoint, tmp_path):
    """A copy of a tiny checkpoint, to be damaged: `weights("flux")`."""
    return lambda kind="sdxl": shutil.copytree(tiny_checkpoint(kind), tmp_path / kind)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
@pytest.mark.parametrize("component", ["vae", "denoiser"])
def test_images_that_are_not_finite_are_never_saved(kind, component, asked, weights):
    folder = weights(kind)
    name = component if component == "vae" else {"sdxl": "unet", "flux": "transformer"}[kind]
    file = folder / name / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(("conv_out.weight", "proj_out.weight")))
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, file, {"format": "pt"})
    cfg = asked(f"model.source={folder}", kind=kind)
    with pytest.raises(ValueError, match=rf"finite images of model={cfg.model.name} in float32, got NaN"):
        generate(plan_from(cfg))
    assert not list((folder.parent / "outputs").rglob("*.png"))


def test_half_precision_is_named_where_it_may_be_the_cause(tiny_sdxl):
    from experiments.generate import _to_pil

    model = OmegaConf.create({"name": "sdxl", "dtype": "float16"})
    with pytest.raises(ValueError, match=r"overflows in float16: give model\.dtype=float32"):
        _to_pil(tiny_sdxl, torch.full((1, 8, 8, 3), float("nan")).numpy(), model)


@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("sdxl", "tokenizer"), ("sdxl", "tokenizer_2"), ("flux", "tokenizer_2")]
)
def test_a_checkpoint_without_a_vocabulary_is_incomplete(kind, tokenizer, asked, weights):
    folder = weights(kind)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        (folder / tokenizer / name).unlink(missing_ok=True)
    with pytest.raises(
        FileNotFoundError, match=rf"not a complete {kind} pipeline folder(.|\n)*{tokenizer}/tokenizer\.json"
    ):
        generate(plan_from(asked(f"model.source={folder}", kind=kind)))


def test_a_vocabulary_in_two_files_is_one(weights):
    folder = weights()
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert checkpoints.missing_files(folder, "sdxl") == ["tokenizer/tokenizer.json"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert not checkpoints.missing_files(folder, "sdxl")


def test_a_scorer_without_a_vocabulary_is_missing(tmp_path):
    folder = shutil.copytree(PROJECT / "models" / "mini-clip", tmp_path / "clip")
    assert HFClip(folder).weights().present
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the weights of clip \(tokenizer\.json\)"):
        HFClip(folder).prepare()


def test_a_scorer_with_damaged_weights_is_named(tmp_path):
    folder = shutil.copytree(PROJECT / "models" / "mini-clip", tmp_path / "clip")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"weights of clip in .* cannot be loaded .*into {folder} or give another"):
        HFClip(folder).prepare()


@pytest.mark.parametrize(
    ("kind", "change", "multiple"),
    [
        ("sdxl", "height=0", 2), ("sdxl", "width=65", 2), ("sdxl", "height=-64", 2), ("sdxl", "width=true", 2),
        ("flux", "height=18", 4), ("flux", "height=0", 4), ("sdxl", "num_inference_steps=0", 1),
        ("sdxl", "num_inference_steps=2.5", 1),
    ],
)  # fmt: skip
def test_a_size_that_the_model_does_not_take_is_refused(kind, change, multiple, asked):
    name, _, value = change.partition("=")
    said = rf"model\.call\.{name} must be a positive multiple of {multiple} for .*got {value.capitalize()}"
    with pytest.raises(ValueError, match=said):
        generate(plan_from(asked(f"model.call.{change}", kind=kind)))


def test_sizes_of_the_configured_models_are_taken(asked):
    for name in ("mini-sdxl", "mini-flux"):
        (cfg,) = expand(["experiment=diversity", f"model={name}", "method=none"])
        checkpoints.find_checkpoint(cfg.model)
    cfg = asked("model.call.height=null", "model.call.width=66")
    checkpoints.find_checkpoint(cfg.model)
    (cfg,) = expand(["experiment=diversity", "model=mini-sdxl", "method=none", "model.call.height=130"])
    with pytest.raises(ValueError, match="multiple of 8 for model=mini-sdxl, got 130"):
        checkpoints.find_checkpoint(cfg.model)


@pytest.mark.parametrize("field", ["categories=bird", "templates=a photo of a", "seeds=3"])
def test_a_text_is_no_list_of_letters(field, asked):
    name, _, value = field.partition("=")
    with pytest.raises(
        ValueError, match=rf"prompts\.{name} must be a list, got .*{value}.*: give prompts\.{name}=\[{value}\]"
    ):
        request(asked(f"prompts.{field}"))


def test_other_texts_in_the_place_of_lists(asked):
    with pytest.raises(ValueError, match=r"prompts\.characters\.ogre\.direct must be a list, got 'an ogre'"):
        CharacterPrompts("x", "test", {"ogre": {"direct": "an ogre"}}, (0,), 2)
    with pytest.raises(ValueError, match=r"prompts\.kinds must be a list, got 'direct'"):
        CharacterPrompts("x", "test", {"ogre": {"direct": ["an ogre"]}}, (0,), 2, kinds="direct")
    with pytest.raises(ValueError, match="images_per_prompt must be a whole number of at least 2, got '4'"):
        request(asked("prompts.images_per_prompt='4'"))
    with pytest.raises(ValueError, match=r"only must be a list of patterns, got 'direct-\*'"):
        list(configured_metrics(RunSpec(asked("+metric.vendi_score.only='direct-*'", f"images={PROJECT}"), "")))
    with pytest.raises(ValueError, match="expected a list of labels"):
        AttributeEntropy(PixelEncoder(), {"bird": "owl"})


@pytest.mark.parametrize("value", ["no", "off", "0", "'false'"])
def test_a_text_is_no_truth(value, asked):
    said = value.strip("'")
    for setting, use in (("compile", request), ("offload", lambda cfg: generate(plan_from(cfg)))):
        with pytest.raises(
            ValueError, match=rf"{setting} must be true or false, got '?{said}'?: give {setting}=true or"
        ):
            use(asked(f"{setting}={value}"))


def test_a_text_is_no_column_of_seconds(asked, tabulated):
    plan = plan_from(asked("report_seconds=no"))
    generate(plan)
    assert Run.of(plan.runs[0]).complete
    with pytest.raises(ValueError, match="report_seconds must be true or false, got 'no'"):
        tabulated(plan)


def test_a_text_is_no_flag_of_a_method():
    (cfg,) = expand(["experiment=copyright", "model=mini-sdxl", "method=negtome_reference", "method.masks=no"])
    with pytest.raises(ValueError, match=r"method\.masks must be true or false, got 'no'"):
        request(cfg)
