"""Experiments over every method's knob: the values asked for and chosen, and the ranking of what was made with them."""

import numpy as np
import pandas as pd
import pytest
import yaml

import experiments
from experiments import PROJECT, catalogue, choose, rank, tables, tabulate
from experiments.configs import build, expand
from experiments.evaluate import evaluate
from experiments.generate import generate

FILES = {file.stem: yaml.safe_load(file.read_text()) for file in (PROJECT / "conf" / "method").glob("*.yaml")}
KNOBS = {name: spec["about"]["knob"] for name, spec in FILES.items() if "knob" in (spec.get("about") or {})}
METHODS = "method=none,lower_guidance,limited_interval"


def asked_for(method, model, **more):
    overrides = ["experiment=peers_grid", f"model={model}", f"method={method}", *(f"{k}={v}" for k, v in more.items())]
    return [cfg for cfg in expand(overrides) if cfg.method.name != "none"]


def at(spec, path):
    for key in path.split("."):
        spec = spec[key]
    return spec


@pytest.mark.parametrize(("experiment", "model"), [("peers_grid", "mini-sdxl"), ("peers_grid_flux", "mini-flux")])
def test_every_method_that_has_a_knob_is_swept_over_as_many_settings_each_of_them_its_own(experiment, model):
    having = [name for name in sorted(KNOBS) if model in KNOBS[name]["values"]]
    configs = expand([f"experiment={experiment}"])
    assert [cfg.method.name for cfg in configs] == ["none", *(name for name in having for _ in range(4))]
    for number, method in enumerate(having):
        knob, own = KNOBS[method], configs[1 + 4 * number : 5 + 4 * number]
        assert [at(cfg.method, knob["setting"]) for cfg in own] == knob["values"][model]
        assert len({str(value) for value in knob["values"][model]}) == 4
        assert len({str(build(cfg.method).settings()) for cfg in own[:2]}) == 2, "which the run's identity knows"
        assert knob["setting"].rpartition(".")[2] in {setting.name for setting in catalogue.settings()}, "as do tables"


def test_what_is_compared_is_documented():
    page = (PROJECT / "docs" / "methods.md").read_text()
    assert [name for name in KNOBS if f"`{name}`" not in page] == []


def test_a_published_checkpoint_has_the_values_of_its_architectures_small_model():
    assert [cfg.method.scale for cfg in asked_for("lower_guidance", "sdxl")] == KNOBS["lower_guidance"]["values"][
        "mini-sdxl"
    ]
    with pytest.raises(ValueError, match=r"values of about.knob for model=sd15 in method=lower_guidance"):
        _ = asked_for("lower_guidance", "sd15")[0].method.scale
    with pytest.raises(ValueError, match=r"knob must be null, chosen or from 0 to 3, got 4"):
        _ = asked_for("lower_guidance", "mini-sdxl", knob=4)[0].method.scale


@pytest.fixture(scope="module")
def grid(tiny_checkpoint, tmp_path_factory):
    """A grid of two methods on a tiny checkpoint, made and tabulated: overrides, configurations, folder."""
    folder = tmp_path_factory.mktemp("peers")
    small = [
        "model=sdxl", f"model.source={tiny_checkpoint('sdxl')}", "model.dtype=float32", "model.call.height=32",
        "model.call.width=32", "model.call.num_inference_steps=2", "prompts.categories=[flower,fruit,horse,truck]",
        "prompts.images_per_prompt=2", "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score",
        "primary.quality=vendi_score", "bootstrap.n_resamples=200", METHODS, f"outputs={folder}",
    ]  # fmt: skip
    configs = expand(["experiment=peers_grid", *small])
    for cfg in configs:
        generate(cfg)
        evaluate(cfg)
    tabulate.write_table(configs)
    return small, configs, folder / "results"


def test_a_grid_is_ranked(grid):
    _, configs, results = grid
    page = rank.write_ranking(configs)
    frame = pd.read_csv(results / "peers_grid_ranking.csv")
    assert list(frame.columns) == rank.COLUMNS and list(frame["method"]) == ["lower_guidance", "limited_interval"]
    assert sorted(frame["rank"]) == [1, 2] and set(frame["settings"]) == {4} and set(frame["n_units"]) == {4}
    assert frame["first_share"].sum() == pytest.approx(1) and (frame["seconds"] > 0).all()
    assert (frame["gain_low"] <= frame["gain_high"]).all() and frame["front_share"].between(0, 1).all()
    # Once more from the table: the path through the settings' differences to the loss that is asked for.
    table = tables.read_table("peers_grid", results)
    for _, row in frame.iterrows():
        rows = table[table["method"] == row["method"]]
        gains, kept = (
            rows.loc[rows["metric"] == name, "difference"].to_numpy() for name in (row["claim"], row["quality"])
        )
        path, lost = [0, *gains], [0, *-kept]
        beyond = next((i for i, loss in enumerate(lost) if loss > row["loss"]), None)
        expected = (
            path[-1]
            if beyond is None
            else np.interp(row["loss"], lost[beyond - 1 : beyond + 1], path[beyond - 1 : beyond + 1])
        )
        assert row["gain"] == pytest.approx(expected, rel=1e-3)
    assert "lower guidance" in page and rank.render(frame) == page


def test_the_chosen_setting_is_what_the_rule_takes_from_the_grid(grid):
    small, configs, results = grid
    rank.write_choice(configs)
    frame = tables.read_table("peers_grid", results)
    chosen = {cfg.method.name: cfg for cfg in expand(["experiment=peers", *small])}
    for method in ("lower_guidance", "limited_interval"):
        rows = frame[frame["method"].isin([method, "none"])]
        run = choose.chosen_run(rows, *tables.primary_pair(frame), "sdxl")
        runs = list(dict.fromkeys(rows.loc[rows["method"] == method, "run_id"]))
        expected = KNOBS[method]["values"]["mini-sdxl"][0 if run is None else runs.index(run)]
        assert at(chosen[method].method, KNOBS[method]["setting"]) == expected


def test_another_models_choices_stay(grid):
    _, configs, results = grid
    file = results / "peers_grid_chosen.yaml"
    file.write_text("another: {cads: 0.5}\n")
    assert rank.write_choice(configs) == file
    written = yaml.safe_load(file.read_text())
    assert written["another"] == {"cads": 0.5} and set(written["sdxl"]) == {"lower_guidance", "limited_interval"}


def test_a_chosen_setting_needs_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "chosen_file", lambda results: tmp_path / "none.yaml")
    (cfg,) = [cfg for cfg in asked_for("lower_guidance", "mini-sdxl", knob="chosen") if cfg.method.name != "none"]
    with pytest.raises(ValueError, match=r"value of scale for lower_guidance on mini-sdxl .* make peers"):
        build(cfg.method)
