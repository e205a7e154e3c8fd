"""Every model of conf/model/: it goes with every method, says what is missing without weights, and is documented."""

import re

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from experiments import PROJECT
from experiments.configs import build
from experiments.plan import expand
from experiments.runs import checkpoints

MODELS = sorted(file.stem for file in (PROJECT / "conf" / "model").glob("*.yaml"))
REAL = [name for name in MODELS if not name.startswith("mini-")]
METHODS = ("none", "negtome", "negtome_released", "negative_prompt", "negtome_reference", "random_match")


@pytest.fixture(scope="module")
def methods():
    return {name: expand([f"method={name}"])[0].method for name in METHODS}


@pytest.fixture
def method_of(methods, with_model):
    """A method's configuration beside a model's: what composing both gives, as neither has the other's files."""

    def of(model, method, **metadata):
        known = {key: with_model(model).model[key] for key in ("name", "architecture")}
        cfg = OmegaConf.create({"model": known, "method": methods[method], "retriever": {}})
        cfg.method.metadata.update(metadata)
        return cfg.method

    return of


@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_every_method(model, method_of):
    for name in METHODS:
        assert OmegaConf.to_container(method_of(model, name), resolve=True)["name"] == name
    method = build(method_of(model, "negtome"))
    assert method.config.sites is None and (method.config.alpha, method.config.reference) == (0.9, "first")
    assert build(method_of(model, "negtome_released")).config.matching == "released"


def test_an_unknown_choice_of_blocks_is_refused_and_the_known_ones_are_named(method_of):
    assert method_of("sdxl", "negtome", blocks="early").sites == ["up_blocks.0"]
    for model, known in (("sd3.5-large", r"\['release'\]"), ("sdxl", r"\['all', 'early', 'late', 'release'\]")):
        with pytest.raises(InterpolationResolutionError, match=f"one of {known} for model={model}, got 'erly'"):
            _ = method_of(model, "negtome", blocks="erly").sites


@pytest.mark.parametrize("name", REAL)
def test_without_weights_and_network_the_message_says_what_to_fetch(name, with_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = with_model(name).model
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.find_checkpoint(model)
    message = str(error.value)
    assert f"hf download {model.source}" in message and "model_index.json" in message
    assert ("gated" in message) == ("gated" in model.licence[model.source])


def row(model, method):
    """The line of a model in the documentation's table."""
    call, window = model.call, method.timestep_range
    scale = call.true_cfg_scale if call.guidance_scale is None else call.guidance_scale
    cells = [f"`{model.name}`", model.source, model.licence[model.source], f"{call.num_inference_steps}, {scale:g}"]
    return " | ".join([*cells, f"{window[1]} to {window[0]}" if window else "none"])


def test_the_documentation_lists_the_real_models_as_they_are_configured(with_model, method_of):
    lines = (PROJECT / "docs" / "running.md").read_text().splitlines()
    rows = [re.sub(" +", " ", line).strip("| ") for line in lines if line.startswith("| `") and "`model=`" not in line]
    assert sorted(rows) == sorted(row(with_model(name).model, method_of(name, "negtome")) for name in REAL)
