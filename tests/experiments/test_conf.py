"""Every option of every group composes and instantiates; every experiment stands for the runs it names."""

import functools
import json
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
from experiments.compose import compose_runs, expand, first
from experiments.compose import composed as compose_once
from experiments.configs import build
from experiments.methods.assets import Retriever, read_assets
from experiments.methods.combined import Combined
from experiments.methods.method import Baseline
from experiments.methods.negative import NegativeIPAdapter, NegativePrompt
from experiments.methods.negtome import NegToMe, NegToMeFromAssets
from experiments.prompts import CharacterPrompts, PeoplePrompts, PromptSet
from experiments.runs.identity import config_digest
from experiments.runs.metrics import NEEDS
from experiments.safety.requests import PolicyPrompts
from experiments.tabulate import primary_metrics
from negtome import NegToMeConfig

CONF = PROJECT / "conf"
# Root-level groups; the others are placed into a model by its file, which names a domain.
OPTIONS = {
    group: sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    for group in ("model", "method", "prompts", "metric", "launcher", "experiment", "applications")
}
#: What an option has no default for.
WEIGHTS = {"method": ("all_method.negative_ip_adapter.weights={subfolder: s, weight_name: w}",)}
#: Experiments that settings are chosen by: never on the prompts that are reported.
CHOOSING = {"sweep", "sweep_flux", "copyright_sweep", "peers_grid", "peers_grid_flux"}
CHOOSING |= {"few_steps_sweep", "few_steps_peers_grid", "safety_floors"}
CHOOSING |= {f"ablate_{setting}" for setting in ("alpha", "threshold", "window", "blocks")}
#: Options that stand for the others of their group by default.
REPRESENTATIVE = {
    "model": {"mini-sdxl", "mini-flux", "sdxl"},
    "experiment": {"diversity", "sweep", "copyright", "safety"},
    "guard": {"nearest"},
}  # fmt: skip
#: Suites of metrics that the tests of models and experiments build.
SUITES_OF_OTHERS = {"copyright", "copyright_tune", "diversity", "fair", "full", "safety", "stereotypes"}
#: Suites that need networks of others, which are rarely changed.
RARE = {"paper", "preference", "released"}


@functools.cache
def composed(*overrides):
    """Compose a configuration, once for all tests. Not to be changed."""
    return compose_once(overrides)


def experiment_of(name, model):
    """Compose an experiment with a model; the default's is the one that other tests compose."""
    return composed(f"experiment={name}", *([] if model == "mini-sdxl" else [f"model={model}"]))


@functools.cache
def side_by_side(group, *overrides):
    """Compose all options of a group into one configuration; return each by its name."""
    options = [f"+{group}@all_{group}.{option}={option}" for option in OPTIONS[group]]
    return composed(*overrides, *options, *WEIGHTS.get(group, ()))[f"all_{group}"]


def options_of(group):
    """List the options of a group; those that others stand for are slow."""
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return [pytest.param(name, marks=[] if name in REPRESENTATIVE[group] else pytest.mark.slow) for name in names]


@functools.cache
def metric(name, settings):
    """Build what is configured, as JSON: once, where several options configure the same."""
    return build(OmegaConf.create(json.loads(settings) | {"name": name}))


def check_metrics(metrics):
    """Build what is configured, but for metrics that lack images to compare with."""
    for name, settings in metrics.items():
        if any(need in settings and settings[need] is None for need in NEEDS):
            continue
        settings |= {"baseline": "run"} if "baseline" in settings else {}
        for key in ("only", "kind"):
            settings.pop(key, None)
        assert metric(name, json.dumps(settings)).name == name


def check_run(cfg):
    """Resolve a run's configuration and build its parts."""
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert build(cfg.method).name == cfg.method.name
    assert isinstance(build(cfg.prompts), (PromptSet, CharacterPrompts, PeoplePrompts, PolicyPrompts))
    assert resolved["metric"]
    check_metrics(resolved["metric"])


@pytest.mark.parametrize("option", OPTIONS["method"])
def test_every_method_resolves_and_is_built(option):
    spec = side_by_side("method")[option]
    assert OmegaConf.to_container(spec, resolve=True, throw_on_missing=True)
    assert build(spec).name == spec.name


@pytest.mark.parametrize("option", OPTIONS["prompts"])
def test_every_set_of_prompts_is_built(option):
    assert isinstance(
        build(side_by_side("prompts")[option]), (PromptSet, CharacterPrompts, PeoplePrompts, PolicyPrompts)
    )


@pytest.mark.parametrize(
    "option",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SUITES_OF_OTHERS | RARE)) for name in OPTIONS["metric"]],
)
def test_every_suite_of_metrics_is_built(option):
    metrics = OmegaConf.to_container(composed(f"metric={option}").metric, resolve=True, throw_on_missing=True)
    assert metrics or option == "none"
    check_metrics(metrics)


@pytest.mark.parametrize("option", OPTIONS["launcher"])
def test_every_launcher_composes(option):
    assert ("jobs" in composed(f"launcher={option}").launcher) == (option != "local")


@pytest.mark.parametrize("option", options_of("model"))
def test_every_model_resolves_with_the_metrics_that_fit_it(option, with_model):
    cfg = with_model(option)
    check_run(cfg)
    assert set(cfg.metric) == set(with_model("mini-sdxl" if cfg.model.kind == "mini" else "sdxl").metric)
    model, methods = cfg.model, set(OPTIONS["method"])
    assert set(model) == set(with_model("sdxl").model), "all models have the same keys"
    assert not methods & {*model, *model.copyright}, "models know no method"


@pytest.mark.parametrize("experiment", options_of("experiment"))
def test_every_experiment_resolves_and_tests_one_claim_of_each_kind_of_prompts_and_one_quality(experiment):
    declared = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    model = OmegaConf.select(declared, "hydra.sweeper.params.model", default="mini-sdxl").split(",")[0]
    cfg = experiment_of(experiment, model)
    check_run(cfg)
    if experiment == "latency":
        return
    assert build(cfg.prompts).split == ("development" if experiment in CHOOSING else "test")
    tested = primary_metrics(cfg)
    assert len(set(tested.values())) == 2 and "quality" in tested.values()
    # Named prompts and others; several measures of quality; two attributes, each where it is open and where it is said.
    several = {"copyright": 5, "copyright_sweep": 4, "peers_copyright": 3, "safety": 3, "stereotypes": 4}
    few_steps = [f"few_steps{suffix}" for suffix in ("", "_sweep", "_peers", "_peers_grid", "_distilled")]
    several |= dict.fromkeys(["diversity", "sweep", "sweep_flux", "cfg_scale", "cfg_scale_flux", *few_steps], 3)
    several |= {
        f"ablate_{setting}": 3 for setting in ("alpha", "threshold", "window", "blocks", "matching", "approximation")
    }
    assert len(tested) == several.get(experiment, 2)
    assert set(tested) <= set(cfg.metric)
    margins = cfg.primary.quality_margin
    assert all(0 < margin < 1 for margin in (margins.values() if OmegaConf.is_config(margins) else [margins]))


@pytest.mark.parametrize("name", options_of("guard"))
def test_every_guard_is_one_and_stands_behind_the_method_that_has_one(name):
    needed = {"chat": ["guard.model=m"], "own": ["guard.name=negtome.guard:Keyword"]}.get(name, [])
    cfg = composed("method=guarded", f"guard={name}", *needed)
    guard = build(cfg.method.guard)
    assert guard.name and guard.id and callable(guard.reply)
    assert composed("method=none", "guard=keyword").method == composed("method=none").method


def test_the_command_line_overrides_the_experiments_sweep():
    configs = expand(["experiment=diversity", "model=sdxl", "method=negtome", "method.alpha=0.3,0.9"])
    assert [(cfg.model.name, cfg.method.name, cfg.method.alpha) for cfg in configs] == [
        ("sdxl", "negtome", 0.3),
        ("sdxl", "negtome", 0.9),
    ]


@pytest.mark.parametrize("methods", ["negtome", "none,negtome", "negtome,none"])
def test_the_baseline_is_there_once_whatever_is_swept(methods):
    """Settings of a method mean nothing to it; those of the model and the prompts do."""
    swept = [f"method={methods}", "method.alpha=0.3,0.9", "model.call.guidance_scale=2,5"]
    runs = [
        (cfg.method.name, cfg.method.get("alpha"), cfg.model.call.guidance_scale)
        for cfg in expand(swept, baselines=True)
    ]
    assert [run for run in runs if run[0] == "none"] == [("none", None, 2), ("none", None, 5)]
    assert [run for run in runs if run[0] != "none"] == [
        ("negtome", alpha, scale) for alpha in (0.3, 0.9) for scale in (2, 5)
    ]
    for scale in (2, 5):
        of_scale = [run[0] for run in runs if run[2] == scale]
        assert of_scale == ["none", "negtome", "negtome"]
    assert len(expand(swept)) == (4 if methods == "negtome" else 6), "and where it is not asked for, it is added"
    one = expand([f"method={methods}", "method.alpha=0.3"], baselines=True)
    assert [cfg.method.get("alpha") for cfg in one] == [None, 0.3], "of a single value too"


def test_the_baseline_of_a_grid_alone_is_one_run_a_model():
    assert [cfg.method.name for cfg in expand(["experiment=sweep", "method=none"])] == ["none", "none"]


def test_real_models_get_the_papers_full_set_and_the_mini_models_a_stated_subset(with_model):
    def groups(model):
        return instantiate(with_model(model).prompts).groups()

    for model in ("sdxl", "flux-dev", "flux-schnell"):
        assert sum(group.size for group in groups(model)) == 5600
    for model in ("mini-sdxl", "mini-flux"):
        assert len({group.category for group in groups(model)}) == 20
        assert len(groups(model)) == 200


def test_no_category_is_both_tuned_and_reported():
    test, development = (instantiate(side_by_side("prompts")[name]) for name in ("diversity", "development"))
    assert (test.split, development.split) == ("test", "development")
    assert not set(test.categories) & set(development.categories)


def test_the_two_matchings_differ_in_the_matching_alone():
    paper, released = (build(side_by_side("method")[name]) for name in ("negtome", "negtome_released"))
    assert isinstance(paper, NegToMe)
    changed = {key for key, value in paper.settings().items() if released.settings()[key] != value}
    assert changed == {"matching"}
    assert (paper.config.matching, released.config.matching) == ("paper", "released")
    assert isinstance(build(side_by_side("method")["none"]), Baseline)


@pytest.mark.slow
def test_the_real_models_strengths_are_the_librarys_presets():
    for model, preset, differs in (
        ("sdxl", ("sdxl", "evaluation"), {"matching", "cross_attention"}),
        ("flux-dev", ("flux", "paper"), set()),
    ):
        configured = build(first([f"model={model}", "method=negtome"]).method).config
        published = NegToMeConfig.preset(*preset)
        changed = {f.name for f in fields(published) if getattr(published, f.name) != getattr(configured, f.name)}
        assert changed == differs, model


@pytest.mark.slow
def test_models_of_few_steps_have_the_librarys_settings_for_them():
    def config(*overrides):
        return build(first(["method=negtome", *overrides]).method).config

    assert config("model=flux-schnell") == NegToMeConfig.few_step("transformer")
    assert config("model=sdxl-turbo") == NegToMeConfig.few_step("unet")
    replaced = config("model=flux-schnell", "method.timestep_range=[900,1000]")
    assert (replaced.step_range, replaced.timestep_range) == (None, (900, 1000))
    replaced = config("model=mini-sdxl", "method.step_range=[0,0.25]")
    assert (replaced.step_range, replaced.timestep_range) == ((0, 0.25), None)
    with pytest.raises(ValueError, match="both choose the steps"):
        config("method.step_range=[0,0]", "method.timestep_range=[900,1000]")


def test_settings_for_a_number_of_steps_replace_those_of_the_model():
    def config(model, steps, *overrides):
        call = f"model.call.num_inference_steps={steps}"
        return build(first([f"model={model}", call, "method=negtome", *overrides]).method).config

    for model, few in (("mini-sdxl", (4, 2)), ("mini-flux", (4, 2))):
        usual = config(model, 20)
        assert usual.timestep_range is not None and usual.step_range is None
        assert config(model, 8) == usual, "no settings for this number"
        for steps in few:
            chosen = config(model, steps)
            assert (chosen.step_range, chosen.timestep_range) == ((0, 0), None)
            assert chosen.min_side == usual.min_side
            assert config(model, steps, "method.alpha=7") == chosen.replace(alpha=7)
            assert config(model, steps, "older_protocol=true") == chosen, "an older table has no few steps"


@pytest.mark.slow
def test_every_run_of_few_steps_is_compared_with_the_baseline_of_as_many_steps():
    runs = compose_runs(["experiment=few_steps"], baselines=True)
    cells = {(cfg.model.name, cfg.model.call.num_inference_steps, cfg.method.name) for cfg, _ in runs}
    assert len(cells) == len(runs) == 34
    for cfg, place in runs:
        baseline = runs[place][0]
        assert baseline.method.name == "none" and baseline.model == cfg.model
    steps_of = {model: {steps for name, steps, _ in cells if name == model} for model in ("mini-sdxl", "mini-flux")}
    assert steps_of == {"mini-sdxl": {20, 4, 2}, "mini-flux": {20, 4}}
    assert {method for _, steps, method in cells if steps == 20} == {"none", "negtome"}


def test_baselines_of_20_steps_are_the_runs_of_diversity():
    few = expand(["experiment=few_steps", "method=none", "model.call.num_inference_steps=20"])
    usual = expand(["experiment=diversity", "method=none"])
    assert [config_digest(cfg) for cfg in few] == [config_digest(cfg) for cfg in usual]


def test_a_further_sweep_keeps_the_values_that_the_command_line_has_too():
    def cells(*overrides):
        configs = expand(["experiment=few_steps", *overrides])
        return [(cfg.model.name, cfg.model.call.num_inference_steps) for cfg in configs]

    sdxl, flux = ([(f"mini-{name}", steps) for steps in (4, 2, 20)] for name in ("sdxl", "flux"))
    assert cells("method=none") == [sdxl[0], flux[0], sdxl[1], sdxl[2], flux[2]]
    assert cells("method=none", "model=mini-sdxl") == sdxl
    assert cells("method=none", "model=mini-flux") == [flux[0], flux[2]]
    assert cells("method=control_blurred") == [sdxl[0], flux[0], sdxl[1]], "no method of the last sweep"
    assert cells("method=control_blurred,negtome", "model=mini-flux") == [flux[0], flux[0], flux[2]]
    assert cells("method=none", "model.call.num_inference_steps=3") == [("mini-sdxl", 3), ("mini-flux", 3)]
    assert cells("method=negtome", "model.call.num_inference_steps=2,20") == [*sdxl[1:], *flux[1:]], "each run once"


def test_a_value_may_be_written_differently_than_in_a_further_sweep():
    alphas = expand(["experiment=few_steps_sweep", "method=negtome", "model=mini-sdxl", "method.alpha=2.70,3.5"])
    cells = [(cfg.model.call.num_inference_steps, cfg.method.alpha, cfg.method.threshold) for cfg in alphas]
    assert sorted(cells) == [(steps, alpha, t) for steps in (2, 4) for alpha in (2.7, 3.5) for t in (0.5, 0.7)]


def test_a_model_that_no_method_knows_has_the_defaults_and_the_published_numbers():
    method = build(first(["model=sdxl", "model.name=mine", "method=negtome"]).method)
    assert method.config == NegToMeConfig() and method.config.published_for("sdxl") == NegToMeConfig.preset("sdxl")
    assert build(first(["model=sdxl", "model.name=mine", "method=negtome", "method.alpha=2"]).method).config.alpha == 2


def test_a_suite_fits_its_model():
    """In a sweep too; and a suite on the command line, or an experiment's, replaces it."""
    swept = expand(["experiment=diversity", "model=mini-sdxl,sdxl", "method=none"])
    suites = {cfg.model.name: set(cfg.metric) for cfg in swept}
    assert "fid" in suites["sdxl"] and not {"fid", "kid", "lpips_alex"} & suites["mini-sdxl"]
    core = {"pairwise_similarity", "pairwise_distance", "vendi_score", "clip_score"}
    assert core < suites["sdxl"] and core < suites["mini-sdxl"]
    assert set(composed("experiment=diversity", "model=sdxl", "metric=core").metric) == core
    assert set(composed("experiment=peers_grid").metric) == {"pairwise_distance", "clip_score"}


def test_settings_are_chosen_within_half_the_margin_that_is_reported():
    names = ("sweep", "diversity", "copyright_sweep", "copyright")
    margins = {name: composed(f"experiment={name}").primary.quality_margin for name in names}
    assert margins["sweep"] == margins["diversity"] / 2
    assert margins["copyright_sweep"] == margins["copyright"] / 2


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
    for suite in ("full", "diversity", "released", "paper"):
        for name, spec in composed(f"metric={suite}").metric.items():
            if name.endswith(("fid", "kid", "inception_score")):
                own = "TorchvisionInception" if name == "released_inception_score" else "Inception"
                assert spec.encoder._target_ == f"eval.features.{own}", name
            if suite == "diversity" and spec._target_.startswith("eval.fidelity"):
                assert name.endswith(("_efflite0", "_scorer")), name


def test_the_documentation_names_every_metric():
    text = (PROJECT / "docs" / "metrics.md").read_text()
    named = re.findall(r"`([a-z_0-9*]+)`", text)
    links = set(re.findall(r"\]\(#([a-z0-9-]+)\)", text))
    titles = re.findall(r"^###? (.+)$", text, re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert links <= headings
    for suite in ("diversity", "fair", "full", "released", "paper", "stereotypes"):
        for name, spec in composed(f"metric={suite}").metric.items():
            assert any(fnmatch(name, pattern) for pattern in named), f"{name} ({spec._target_})"


def test_a_misspelt_key_is_named():
    with pytest.raises(ValueError, match=r"alpah.*did you mean method\.alpha"):
        expand(["method=negtome", "method.alpah=1"])
    with pytest.raises(Exception, match="alpah"):
        build(expand(["method=negtome", "+method.alpah=1"])[0].method)


def test_the_labels_cover_the_categories(with_model):
    for model, prompts in [("mini-sdxl", "diversity"), ("mini-sdxl", "development"), ("sdxl", "diversity")]:
        categories = instantiate(side_by_side("prompts")[prompts]).categories
        assert set(categories) <= set(with_model(model).model.labels)


def test_paths_are_relative_to_the_checkout_not_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = expand([])[0]
    assert Path(cfg.model.scorer.folder) == PROJECT / "models" / "mini-clip"
    assert os.getcwd() == str(tmp_path)


# --- copyright --------------------------------------------------------------------------------------------------------

ASSET_METHODS = ("negative_prompt", "negtome_reference", "negtome_and_negative_prompt", "negtome_reference_released")


@pytest.mark.parametrize(("model", "n_characters"), [("mini-sdxl", 20), ("sdxl", 52)])
def test_every_character_is_asked_for_in_every_way(model, n_characters):
    cfg = experiment_of("copyright", model)
    prompts = build(cfg.prompts)
    assert (len(prompts.characters), prompts.split) == (n_characters, "test")
    kinds = {character: set(asked) for character, asked in prompts.characters.items()}
    assert all(asked >= {"direct", "indirect", "benign"} for asked in kinds.values())
    for character, asked in prompts.characters.items():
        assert all(character.lower() in prompt.lower() for prompt in asked["direct"])
        assert not any(character.lower() in prompt.lower() for prompt in asked["benign"])
    images = sum(group.size for group in prompts.groups())
    assert images == (1200 if model == "mini-sdxl" else 2496)
    # Every metric that is of some prompts alone finds some.
    for name, spec in cfg.metric.items():
        for pattern in spec.get("only") or []:
            assert any(fnmatch(group.prompt_id, pattern) for group in prompts.groups()), name


def test_the_mini_models_assets_are_the_characters_and_none_is_scored_against():
    """The retriever refuses shared pictures itself; what is scored against shows the same characters."""
    development = composed("experiment=copyright_sweep").prompts.characters
    for model in ("mini-sdxl", "mini-flux"):
        cfg = experiment_of("copyright", model)
        retriever = build(cfg.retriever)
        assert isinstance(retriever, Retriever)
        characters = set(cfg.prompts.characters) | set(development)
        assert len(characters) == len(cfg.prompts.characters) + len(development)
        assert {asset.name for asset in retriever.assets} == characters
        assert {asset.name for asset in read_assets(cfg.model.copyright.scoring)} == characters
        assert all(asset.mask_file for asset in retriever.assets)


def test_the_threshold_is_calibrated_on_prompts_that_are_not_reported():
    cfg = composed("experiment=copyright")
    ordinary, reported = build(cfg.retriever.ordinary), build(cfg.prompts)
    assert ordinary.split == "development"
    assert not {prompt for _, prompt in ordinary.prompts()} & {
        prompt for asked in reported.characters.values() for kind in ("direct", "indirect") for prompt in asked[kind]
    }
    assert cfg.retriever.encoder == cfg.model.scorer


@pytest.mark.parametrize(
    "model", ["sdxl", *(pytest.param(f"flux-{x}", marks=pytest.mark.slow) for x in ("dev", "schnell"))]
)
def test_the_real_models_ask_for_the_users_pictures(model):
    for method in ASSET_METHODS:
        with pytest.raises(FileNotFoundError, match=r"model\.copyright\.guidance=FOLDER"):
            build(first([f"model={model}", f"method={method}"]).method)
    assert isinstance(build(first([f"model={model}", "method=none"]).method), Baseline)


def test_a_negative_ip_adapter_asks_for_weights():
    with pytest.raises(FileNotFoundError, match=r"method\.weights=\{"):
        build(composed("method=negative_ip_adapter").method)
    method = build(side_by_side("method")["negative_ip_adapter"])
    assert isinstance(method, NegativeIPAdapter) and method.weights == {"subfolder": "s", "weight_name": "w"}


def test_the_methods_with_assets_differ_in_what_they_say():
    fixed = "model.copyright.thresholds.prompt=0.5"  # nothing to calibrate
    method = {name: build(first(["model=mini-flux", f"method={name}", fixed]).method) for name in ASSET_METHODS}
    paper, released = method["negtome_reference"], method["negtome_reference_released"]
    assert isinstance(paper, NegToMeFromAssets) and isinstance(method["negative_prompt"], NegativePrompt)
    changed = {key for key, value in paper.settings().items() if released.settings()[key] != value}
    assert changed == {"matching", "noise", "posterior", "images"}
    assert method["negative_prompt"].true_cfg_scale == 2.0, "or Flux would not heed it"
    assert build(first(["method=negative_prompt"]).method).true_cfg_scale is None
    both = method["negtome_and_negative_prompt"]
    assert isinstance(both, Combined)
    assert [part.settings() for part in both.methods] == [method["negative_prompt"].settings(), paper.settings()]


def test_own_errors_are_not_buried_in_hydras():
    with pytest.raises(ValueError, match=r"^method\.images must be at least 1"):
        build(composed("method=negtome_reference", "method.images=0").method)
    with pytest.raises(HydraException, match="bta"):
        build(composed("method=none", "+method.bta=1").method)


def assert_equal(ours, theirs):
    """Compare configurations as texts, which tell 1 from 1.0 and know the order."""
    for resolve in (False, True):
        one, other = (repr(OmegaConf.to_container(cfg, resolve=resolve)) for cfg in (ours, theirs))
        assert one == other
    assert OmegaConf.is_struct(ours) and OmegaConf.is_struct(ours.method)


def check_equals_hydra(overrides):
    """Compare a run with what Hydra composes from all overrides at once."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = compose("config", overrides)
    assert_equal(first(overrides), theirs)


def test_a_run_is_what_hydra_itself_composes():
    check_equals_hydra(
        ["experiment=sweep", "model=mini-sdxl", "method=negtome_stronger", "method.alpha=0.9", "method.threshold=0.5",
         "method.timestep_range=[900,1000]", "model.groups_per_category=3", "prompts.categories=[a,b]",
         "~metric.clip_score", "+model.call.clip_skip=1", "scorer@model.scorer=pixel", "hydra.job.name=mine"]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS["method"])
@pytest.mark.parametrize("model", ["mini-flux", "sdxl"])
def test_every_method_is_composed_as_hydra_itself_composes_it(model, option):
    changes = [text.replace(f"all_method.{option}", "method") for text in WEIGHTS["method"] if option in text]
    check_equals_hydra(["experiment=copyright", f"model={model}", f"method={option}", *changes])


#: A small folder like conf/, in which files of other groups have settings of methods, and methods have other settings.
INTERWOVEN = {
    "config": "defaults: [_self_, model: big, method: none, guard: soft, experiment: null]\nmethod: ???\nname: adhoc\n"
    + "".join(f"{key}: null\n" for key in ("further_sweeps", "hyperparameter", "chosen", "policy", "references")),
    "model/big": "name: big\nsize: 3",
    "model/pushy": "# @package _global_\nmodel: {name: pushy, size: 3}\nmethod: {alpha: 3}",
    "guard/soft": "name: soft",
    "guard/hard": "name: hard",
    "guard/of_method": "defaults: [/part@steps: '${method}']\nname: of_method",
    "part/negtome": "size: 1",
    "part/other": "size: 2",
    "experiment/weak": "# @package _global_\nmethod: {alpha: 0.25}",
    "experiment/chosen": "# @package _global_\ndefaults: [override /method: parts]",
    "method/none": "name: none",
    "method/negtome": "name: negtome\nalpha: 0.5\nsize: ${model.size}",
    "method/mine": "defaults: [negtome]\nname: mine\nalpha: 1",
    "method/parts": "defaults: [/part@inner: other, negtome@outer]\nname: parts",
    "method/wide": "# @package _global_\nmethod: {name: wide}\nname: wide",
    "method/strict": "defaults: [override /guard: hard]\nname: strict",
    "method/by_guard": "defaults: [/guard@inner: '${guard}']\nname: by_guard",
}


@pytest.mark.parametrize(
    "overrides",
    [*([key.replace("/", "=")] for key in INTERWOVEN if key.startswith("method/")),
     ["method=negtome", "model=pushy"], ["method=negtome", "guard=of_method"], ["method=mine", "guard=of_method"],
     ["method=mine", "experiment=weak"], ["method=mine", "experiment=chosen"], ["experiment=chosen"],
     ["method=mine", "+method.note=1"], ["method=parts", "part@method.inner=negtome"]],
)  # fmt: skip
def test_methods_are_composed_apart_only_where_that_changes_nothing(overrides, tmp_path, monkeypatch):
    for path, text in INTERWOVEN.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / f"{path}.yaml").write_text(text)
    monkeypatch.setattr("experiments.compose.CONF", tmp_path)
    overrides = [*overrides, "model.size=4", f"hydra.job.name={tmp_path.name}"]  # the name keeps it out of caches
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        try:
            theirs = compose("config", overrides)
        except HydraException:
            theirs = None
    if theirs is None:
        with pytest.raises((ValueError, HydraException)):
            first(overrides)
    else:
        assert_equal(first(overrides), theirs)


def test_runs_of_a_sweep_share_nothing_that_can_be_changed():
    weak, strong = expand(["method=negtome", "method.alpha=0.3,0.9"])
    weak.model.call.guidance_scale = 77
    assert (weak.method.alpha, strong.method.alpha) == (0.3, 0.9) and strong.model.call.guidance_scale != 77
