"""The paper's table with our runs in it: what stands below which row, what is never compared, and the way to it."""

import functools

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments import PROJECT, tabulate
from experiments.__main__ import main
from experiments.compose import expand
from experiments.configs import build
from experiments.runs import preflight
from experiments.runs.metrics import build_metric, left_out, left_out_lines, measured
from experiments.tables.columns import COLUMNS
from experiments.tables.paper import MEASURES, ROWS, SECONDS, comparison_table, render_comparison

PAPER = pd.read_csv(PROJECT / "results" / "paper.csv", dtype=str).query("experiment == 'diversity'")
NUMBERS = {"released_dreamsim": 0.7, "clip_score": 33.25, "released_inception_score": 3.5}


def run(model, method, numbers=NUMBERS, **more):
    """Return the rows of a run in an experiment's CSV, each measured by the paper's network unless `more` says so."""
    encoders = {measure.metric: f"{measure.encoder}0123" for measure in MEASURES.values()}
    return [
        {
            "experiment": "paper", "model": model, "method": method, "metric": metric, "value": value, "n_images": 5600,
            "encoder": encoders.get(metric, "other"), "higher_is_better": "dreamsim" not in metric, "seconds": 2.5,
            "device": "a GPU", "run_id": f"{model} {method}", **more,
        }
        for metric, value in numbers.items()
    ]  # fmt: skip


def table(*runs):
    return pd.DataFrame([row for rows in runs for row in rows], columns=COLUMNS)


def changed(cfg, values):
    """Return a copy of a configuration with other values."""
    cfg = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def test_each_row_of_the_paper_is_as_typed_and_the_runs_of_its_methods_follow():
    frame = comparison_table(table(*(run("sdxl", method) for methods in ROWS.values() for method in methods)))
    for method, entries in PAPER.groupby("method", sort=False):
        (place,) = frame.index[(frame["source"] == "the paper") & (frame["method"] == method)]
        for entry in entries.itertuples():
            (column,) = [name for name in frame if name.startswith(f"{entry.metric} (")]
            assert frame.loc[place, column] == entry.value
            assert column.endswith("(up)") == (entry.higher_is_better == "True")
        ours = frame.loc[place + 1 : place + len(ROWS[method])]
        assert (ours["source"] == "ours").all() and (ours["model"] == "sdxl").all()
    assert len(frame) == len(ROWS) + sum(map(len, ROWS.values()))
    assert set(PAPER["metric"]) <= {*MEASURES, SECONDS} and set(PAPER["method"]) == set(ROWS)


def test_a_cell_is_in_the_papers_unit_and_has_its_interval_and_its_difference():
    interval = {"ci_low": 32.0, "ci_high": 34.0}
    difference = {"difference": 1.5, "difference_low": 0.5, "difference_high": 2.5}
    clip_score = {"clip_score": 33.25}
    frame = comparison_table(
        table(run("sdxl", "none", clip_score, **interval), run("sdxl", "negtome", clip_score, **interval, **difference))
    )
    ours = frame[frame["source"] == "ours"].set_index("method")["CLIPScore / 100 (up)"]
    assert ours.to_list() == ["0.333 [0.320, 0.340]", "0.333; +0.015 [+0.005, +0.025]"]


def test_what_the_paper_does_not_print_is_not_available_and_what_we_did_not_measure_is_blank():
    frame = comparison_table(table(run("sdxl", "none"), run("sdxl", "negtome", {**NUMBERS, "kid": 0.01})))
    kid = frame["KID (down)"]
    assert (kid[frame["source"] == "the paper"] == "not available").all()
    assert kid[frame["source"] == "ours"].to_list() == ["", "0.01000"]
    assert not [name for name in frame if name.startswith(("FID", "precision"))]


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-flux"])
def test_a_mini_model_never_stands_below_the_papers_numbers_whatever_scored_it(model):
    alone = render_comparison(table(run(model, "none"), run(model, "negtome")))
    assert "|" not in alone and "0.812" not in alone and model in alone
    page = render_comparison(table(run(model, "none"), run("sdxl", "none")))
    assert "0.812" in page and not [line for line in page.splitlines() if line.startswith("|") and "mini" in line]
    assert model in page


def test_a_number_by_another_network_is_not_compared():
    other = run("sdxl", "none", encoder="pixels-8x8")
    assert "|" not in render_comparison(table(other))
    mixed = table(other[:1], run("sdxl", "none", {"clip_score": 33.25}))
    (ours,) = comparison_table(mixed).query("source == 'ours'").to_dict("records")
    assert ours["CLIPScore / 100 (up)"] == "0.333" and ours["DreamSim similarity (down)"] == ""


@functools.cache
def composed(model, *overrides):
    """Compose the experiment's baseline on a model. Not to be changed."""
    return expand(["experiment=paper", f"model={model}", "method=none", *overrides])[0]


def test_the_experiment_measures_by_the_papers_networks_all_that_the_paper_prints():
    cfg = changed(composed("sdxl"), {"model.reference_images": str(PROJECT)})
    for measure in MEASURES.values():
        assert f"{build_metric(cfg, measure.metric).encoder.slug}-" == measure.encoder
    assert not left_out(cfg)


@pytest.mark.parametrize("model", ["sdxl", pytest.param("flux-dev", marks=pytest.mark.slow)])
def test_real_models_make_the_papers_prompts(model):
    groups = build(composed(model).prompts).groups()
    assert sum(group.size for group in groups) == 5600 and {group.seed for group in groups} == set(range(10))


@pytest.mark.parametrize(("overrides", "per_category"), [((), 1), (("model.groups_per_category=3",), 3)])
def test_mini_models_rehearse_with_few_groups(overrides, per_category):
    assert len(build(composed("mini-sdxl", *overrides).prompts).groups()) == 20 * per_category


@pytest.mark.slow
def test_the_experiment_has_the_methods_of_the_papers_rows():
    settings = {cfg.method.name: build(cfg.method).settings() for cfg in expand(["experiment=paper", "model=sdxl"])}
    assert set(settings) == {method for methods in ROWS.values() for method in methods}
    both = settings["rewriting_and_negtome"]
    assert (settings["rewriting"]["share"], both["share"]) == (1, 1), "all images of a group, as in the paper"
    assert settings["negtome"]["alpha"] == both["alpha"] == 0.9


def test_the_networks_of_photographs_are_left_out_for_mini_models_in_one_line():
    cfg = composed("mini-sdxl")
    (line,) = left_out_lines([cfg, cfg])
    assert all(measure.metric in line for measure in MEASURES.values() if measure.metric != "clip_score")
    assert measured(cfg) == ["pairwise_similarity", "pairwise_distance", "clip_score"]


@pytest.mark.parametrize(
    ("n_images", "metrics", "message"),
    [
        (None, {"released_fid", "fid", "kid", "precision", "recall"}, "does not exist"),
        (3, {"released_fid", "fid", "precision", "recall"}, "got 3 in"),
        (2048, {"released_fid", "fid"}, "at least 2049 reference images"),
        (2049, set(), ""),
    ],
)
def test_reference_images_that_do_not_suffice_are_a_fault_before_the_first_image(n_images, metrics, message, tmp_path):
    """The images are all in one folder, as those of COCO."""
    folder = tmp_path / "val2017"
    if n_images is not None:
        folder.mkdir()
    for number in range(n_images or 0):
        (folder / f"{number:012d}.jpg").touch()
    cfg = changed(composed("sdxl"), {"model.reference_images": str(folder)})
    faults = [fault for fault in preflight.of_scoring([cfg], tables=True) if str(folder) in fault.problem]
    assert {name for fault in faults for name in fault.needed_by} == metrics
    assert all(message in fault.problem for fault in faults[:1])
    assert {text for fault in faults for text in fault.without.split()} == {f"~metric.{name}" for name in metrics}


@pytest.mark.parametrize("asked", [True, False])
def test_the_page_is_written_where_it_is_configured(asked, scored_copy, capsys):
    plan, *_ = scored_copy
    for spec in plan.runs:
        spec.cfg.paper_comparison = asked
    tabulate.main([], plan)
    page, out = plan.result_file("comparison.md"), capsys.readouterr().out
    assert page.exists() == (str(page) in out) == asked
    if asked:  # by an encoder that the paper does not have
        assert page.read_text() in out and "Not compared with the paper: sdxl" in page.read_text()


@pytest.mark.slow
def test_the_rehearsal_of_a_mini_model_goes_from_nothing_to_its_page(tmp_path, capsys):
    changes = [
        "prompts.categories=[bird,dog]", "prompts.images_per_prompt=2", "model.call.num_inference_steps=2",
        "bootstrap.n_resamples=100", "workers=1", f"outputs={tmp_path}",
    ]  # fmt: skip
    assert main(["reproduce", "experiment=paper", "model=mini-sdxl", *changes]) == 0
    frame = pd.read_csv(tmp_path / "results" / "paper" / "table.csv")
    assert set(frame["method"]) == {method for methods in ROWS.values() for method in methods}
    assert frame["seconds"].gt(0).all() and set(frame["encoder"].str.partition("-")[0]) == {"mini"}
    page = (tmp_path / "results" / "paper" / "comparison.md").read_text()
    assert "|" not in page and not [value for value in PAPER["value"] if value in page]
    assert not [line for line in capsys.readouterr().out.splitlines() if "0.812" in line]
