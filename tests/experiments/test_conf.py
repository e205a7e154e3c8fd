"""Every option of every group composes and instantiates; every experiment stands for the runs it names."""

import os
import re
from collections import Counter
from dataclasses import fields
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from eval.attributes import minimum_images
from experiments import PROJECT
from experiments.configs import expand
from experiments.methods import Baseline, NegToMe
from experiments.prompts import PromptSet
from negtome import NegToMeConfig

CONF = PROJECT / "conf"
# Root-level groups; scorer and labels are placed into a model by that model's file.
OPTIONS = [
    (group, file.stem)
    for group in ("model", "method", "prompts", "metric", "launcher", "experiment")
    for file in sorted((CONF / group).glob("*.yaml"))
]


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: str(value))
def test_every_option_composes_and_resolves(group, option):
    cfg = composed(f"{group}={option}")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    method = instantiate(cfg.method)
    assert method.name == cfg.method.name
    assert isinstance(instantiate(cfg.prompts), PromptSet)
    assert cfg.metric
    for name, spec in cfg.metric.items():
        if spec.get("reference", "not needed") is not None:
            assert instantiate(spec, name=name).name == name


def test_every_group_of_the_folder_is_tested():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {group for group, _ in OPTIONS} | {"scorer", "labels"}


def test_the_diversity_experiment_is_both_mini_models_times_three_methods():
    configs = expand(["experiment=diversity"])
    assert [(cfg.model.name, cfg.method.name) for cfg in configs] == [
        (model, method) for model in ("mini-sdxl", "mini-flux") for method in ("none", "negtome", "negtome_released")
    ]


def test_the_command_line_overrides_the_experiments_sweep():
    configs = expand(["experiment=diversity", "model=sdxl", "method=negtome", "method.alpha=0.3,0.9"])
    assert [(cfg.model.name, cfg.method.name, cfg.method.alpha) for cfg in configs] == [
        ("sdxl", "negtome", 0.3),
        ("sdxl", "negtome", 0.9),
    ]


def test_real_models_get_the_papers_full_set_and_the_mini_models_a_stated_subset():
    def groups(model):
        return instantiate(expand([f"model={model}"])[0].prompts).groups()

    for model in ("sdxl", "flux-dev", "flux-schnell"):
        assert sum(group.size for group in groups(model)) == 5600
    for model in ("mini-sdxl", "mini-flux"):
        assert len({group.category for group in groups(model)}) == 20
        assert len(groups(model)) < 100


def test_no_category_is_both_tuned_and_reported():
    test, development = (instantiate(expand([f"prompts={name}"])[0].prompts) for name in ("diversity", "development"))
    assert (test.split, development.split) == ("test", "development")
    assert not set(test.categories) & set(development.categories)


def test_the_two_matchings_differ_in_the_matching_alone():
    paper, released = (instantiate(expand([f"method={name}"])[0].method) for name in ("negtome", "negtome_released"))
    assert isinstance(paper, NegToMe)
    changed = {key for key, value in paper.settings().items() if released.settings()[key] != value}
    assert changed == {"matching"}
    assert (paper.config.matching, released.config.matching) == ("paper", "released")
    assert isinstance(instantiate(expand(["method=none"])[0].method), Baseline)


def test_the_real_models_strengths_are_the_librarys_presets():
    for model, preset, differs in (
        ("sdxl", ("sdxl", "evaluation"), {"matching", "cross_attention"}),
        ("flux-dev", ("flux", "paper"), set()),
    ):
        configured = instantiate(expand([f"model={model}", "method=negtome"])[0].method).config
        published = NegToMeConfig.preset(*preset)
        changed = {f.name for f in fields(published) if getattr(published, f.name) != getattr(configured, f.name)}
        assert changed == differs, model


def test_every_model_is_measured_by_the_suite_that_fits_it():
    """In a sweep too; and a suite on the command line, or an experiment's, replaces it."""
    models = [option for group, option in OPTIONS if group == "model"]
    configs = expand(["experiment=diversity", f"model={','.join(models)}", "method=none"])
    suites = {cfg.model.name: set(cfg.metric) for cfg in configs}
    assert suites["mini-sdxl"] == suites["mini-flux"] and suites["sdxl"] == suites["flux-dev"] == suites["flux-schnell"]
    assert "fid" in suites["sdxl"] and not {"fid", "kid", "lpips_alex"} & suites["mini-sdxl"]
    core = {"pairwise_similarity", "pairwise_distance", "vendi_score", "clip_score"}
    assert core < suites["sdxl"] and core < suites["mini-sdxl"]
    assert set(composed("experiment=diversity", "model=sdxl", "metric=core").metric) == core
    assert set(composed("experiment=tune").metric) == {"pairwise_distance", "clip_score"}


@pytest.mark.parametrize("experiment", [option for group, option in OPTIONS if group == "experiment"])
def test_every_experiment_declares_what_it_tests(experiment):
    declared = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    assert declared.primary.keys() == {"diversity", "quality", "quality_margin"}
    for model in declared.hydra.sweeper.params.model.split(","):
        cfg = composed(f"experiment={experiment}", f"model={model}")
        assert {cfg.primary.diversity, cfg.primary.quality} <= set(cfg.metric)
        assert 0 < cfg.primary.quality_margin < 1


def test_the_labels_at_full_size_are_of_their_categories():
    labels = OmegaConf.to_container(OmegaConf.load(CONF / "labels" / "imagenet.yaml"))
    assert all(len(set(kinds)) == len(kinds) for kinds in labels.values())
    for one, other in combinations(("mammal", "insect", "bird", "fish"), 2):
        assert not set(labels[one]) & set(labels[other]), (one, other)
    for category in ("mammal", "insect", "bird", "dog"):
        assert set(labels[category]) <= set(labels["animal"]), category
    assert set(labels["dog"]) <= set(labels["mammal"])
    plain = {"person", "woman", "man", "child", "dragon", "shirt", "dress"}
    assert all(len(kinds) >= 20 for category, kinds in labels.items() if category not in plain)


def test_the_mini_models_entropies_have_images_enough():
    """At the experiments' own size, every category of every entropy of their suite: none is refused or left out."""
    for cfg in expand(["experiment=diversity", "method=none"]):
        images = Counter()
        for group in instantiate(cfg.prompts).groups():
            images[group.category] += group.size
        entropies = [spec for spec in cfg.metric.values() if spec._target_.endswith("AttributeEntropy")]
        assert entropies
        for spec in entropies:
            assert all(images[category] >= minimum_images(len(kinds)) for category, kinds in spec.labels.items())


def test_numbers_of_other_networks_are_not_called_fid_or_kid():
    for suite in ("full", "released", "diversity"):
        cfg = composed(f"metric={suite}")
        for name, spec in cfg.metric.items():
            if name.rpartition("_")[2] in ("fid", "kid", "inception_score"):
                assert spec.encoder._target_ == "eval.features.Inception", name
            if suite == "diversity" and spec._target_.startswith("eval.fidelity"):
                assert name.endswith(("_efflite0", "_scorer")), name


def test_the_documentation_names_every_metric():
    text = (PROJECT / "docs" / "metrics.md").read_text()
    named = re.findall(r"`([a-z_0-9*]+)`", text)
    links = set(re.findall(r"\]\(#([a-z0-9-]+)\)", text))
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert links <= headings
    for suite in ("diversity", "released"):
        for name, spec in composed(f"metric={suite}").metric.items():
            assert any(fnmatch(name, pattern) for pattern in named), f"{name} ({spec._target_})"


def test_a_misspelt_key_is_named():
    with pytest.raises(HydraException, match="alpah"):
        expand(["method=negtome", "method.alpah=1"])
    with pytest.raises(Exception, match="alpah"):
        instantiate(expand(["method=negtome", "+method.alpah=1"])[0].method)


def test_every_key_of_the_models_is_the_same_set():
    keys = {}
    for option in (option for group, option in OPTIONS if group == "model"):
        keys[option] = set(expand([f"model={option}"])[0].model)
    assert len(set(map(frozenset, keys.values()))) == 1, keys


def test_the_labels_cover_the_categories():
    for model, prompts in [("mini-sdxl", "diversity"), ("mini-sdxl", "development"), ("sdxl", "diversity")]:
        cfg = expand([f"model={model}", f"prompts={prompts}"])[0]
        assert set(cfg.prompts.categories) <= set(cfg.model.labels)


def test_paths_are_relative_to_the_checkout_not_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = expand([])[0]
    assert Path(cfg.model.scorer.folder) == PROJECT / "models" / "mini-clip"
    assert os.getcwd() == str(tmp_path)
