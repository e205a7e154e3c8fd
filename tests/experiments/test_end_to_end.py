"""From a command line to a table, on tiny checkpoints laid out like the real ones."""

import functools
import json
import shutil
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from plans import plan_from, plan_of

import experiments
from eval.images import read_manifest
from eval.intervals import mean_of
from experiments import PROJECT, plot, tabulate
from experiments.__main__ import main
from experiments.configs import build
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.plan import Plan
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.jobs import prepare_job
from experiments.runs.metrics import left_out_lines, measured
from experiments.runs.store import Run
from experiments.tables.columns import COLUMNS, REQUIRED, TEXT, merge_rows
from experiments.tables.groups import read_groups, values_of_run
from experiments.tables.pages import main_table, other_table


@pytest.fixture(scope="module", autouse=True)
def _tiny_strengths():
    """Strengths of every method on a tiny checkpoint: every token is pushed in every step."""

    def strength(setting, *, _parent_, _root_):
        if _root_.model.kind == "mini":
            return experiments._strength(setting, _parent_=_parent_, _root_=_root_)
        flux = _root_.model.architecture == "flux"
        tiny = {"alpha": 0.9, "timestep_range": [0, 1000], "threshold": -1, "min_side": None if flux else 4,
                "true_cfg_scale": 2.0 if flux else None, "step_range": None}  # fmt: skip
        return tiny[setting]

    OmegaConf.register_new_resolver("strength", strength, replace=True)
    yield
    OmegaConf.register_new_resolver("strength", experiments._strength, replace=True)


def tiny(folder, source, kind="sdxl", name=None):
    """Return overrides for a model's configuration with a tiny checkpoint, two steps and few pixels."""
    side = 16 if kind == "flux" else 32
    return [
        f"model={name or {'sdxl': 'sdxl', 'flux': 'flux-dev'}[kind]}", f"model.source={source}",
        "model.dtype=float32", "model.call.num_inference_steps=2", f"model.call.height={side}",
        f"model.call.width={side}", *(["model.call.max_sequence_length=32"] if kind == "flux" else []),
        "bootstrap.n_resamples=100", f"outputs={folder / 'outputs'}", f"results={folder / 'results'}",
    ]  # fmt: skip


def overrides(folder, source, kind="sdxl", name=None):
    """Return the smallest diversity experiment: two prompts, one seed, two images."""
    return [
        "experiment=diversity", *tiny(folder, source, kind, name), "prompts.categories=[bird,fish]",
        "prompts.templates=[a photo of a]", "prompts.seeds=[0]", "prompts.images_per_prompt=2",
        "prompts.groups_per_category=null", "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score",
        "primary.diversity=pairwise_distance", "primary.quality=vendi_score",
    ]  # fmt: skip


def changed(cfg, changes):
    """Return a copy of a configuration with other values."""
    cfg = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def copy_run(run, outputs):
    """Copy a run, and the plans that name it, to other outputs; return its folder there."""
    for file in run.parents[1].glob("*/plan.json"):
        (outputs / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, outputs / file.parent.name)
    return shutil.copytree(run, outputs / "runs" / run.name)


def copy_weights(source, folder):
    """Copy a checkpoint; return its folder and a function that flips a bit of a component's weights."""
    shutil.copytree(source, folder)

    def flip(component):
        file = folder / component / "diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)

    return folder, flip


def pngs(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


METHODS = ["none", "negtome", "negtome_released"]


class Finished(NamedTuple):
    """An experiment that ran from its overrides to its table; the folders are those of METHODS."""

    arguments: list
    plan: Plan
    folders: list
    frame: pd.DataFrame
    page: str

    @property
    def cfg(self) -> DictConfig:
        return self.plan.runs[1].cfg


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint):
    """Run the diversity experiment on a tiny SDXL checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*overrides(folder, tiny_checkpoint("sdxl")), f"method={','.join(METHODS)}"]
    plan = plan_of(arguments)
    folders = generate(plan)
    evaluate(plan)
    _, page = tabulate.write_table(plan)
    return Finished(arguments, plan, folders, pd.read_csv(plan.result_file(), dtype=TEXT), page)


def test_runs_hold_their_images_and_seeds_and_what_was_pushed(finished):
    none, *pushed = finished.folders
    rows = read_manifest(none)
    assert [(row.prompt, row.category, row.group_seed, row.index) for row in rows] == [
        (f"a photo of a {category}", category, 0, index) for category, index in product(("bird", "fish"), (0, 1))
    ]
    for folder in finished.folders:
        assert [replace(row, sha256=None) for row in read_manifest(folder)] == [replace(r, sha256=None) for r in rows]
        assert set(pngs(folder)) == {(folder / row.path).relative_to(folder) for row in rows}
    for folder in pushed:
        for row in rows:
            # The first image of a group is the baseline's, and the others are pushed from it.
            same = (folder / row.path).read_bytes() == (none / row.path).read_bytes()
            assert same == (row.index == 0), row.path
        for log in Run(folder).statistics():
            assert 0 < log["tokens_pushed"] <= log["tokens_compared"]
    assert [set(log) for log in Run(none).statistics()] == [{"seconds"}] * 2


def test_every_setting_that_affects_pixels_makes_another_run(finished, tmp_path):
    weights, flip = copy_weights(finished.cfg.model.source, tmp_path / "weights")
    flip("unet")

    def run_id(changes):
        cfg = changed(finished.cfg, changes)
        return prepare_job(plan_from(cfg).runs[0], find_checkpoint(cfg.model)).task.run.id

    changes = {
        "method.alpha": 0.5, "method.threshold": 0.1, "method.timestep_range": [500, 1000],
        "method.reference": "others", "model.call.guidance_scale": 2, "model.call.num_inference_steps": 3,
        "prompts.seeds": [1], "prompts.images_per_prompt": 3, "model.source": str(weights),
    }  # fmt: skip
    unchanged = run_id({})
    assert unchanged == finished.folders[1].name == run_id({"bootstrap.seed": 1, "results": "elsewhere"})
    assert len({unchanged, *(run_id({key: value}) for key, value in changes.items())}) == 1 + len(changes)


def test_runs_of_earlier_weights_are_not_taken(tmp_path, tiny_checkpoint):
    weights, flip = copy_weights(tiny_checkpoint("sdxl"), tmp_path / "weights")
    plan = plan_of([*overrides(tmp_path, weights), "method=none", "prompts.categories=[bird]"])
    first = generate(plan)
    flip("vae")
    second = generate(plan)
    assert first != second and [Run.of(spec).folder for spec in plan.runs] == second


def test_the_table_holds_every_run_and_metric_with_paired_differences(finished):
    frame, plan = finished.frame, finished.plan
    assert list(frame.columns) == [column for column in COLUMNS if column in REQUIRED or column in frame]
    assert list(frame["run_id"].unique()) == [folder.name for folder in finished.folders]
    assert set(frame["metric"]) == {"pairwise_similarity", "pairwise_distance", "vendi_score"}
    assert (frame[["n_groups", "n_images", "n_units"]] == [2, 4, 2]).all(axis=None)
    assert set(frame["encoder"]) == {"pixels-8x8"}
    paired = frame["method"] != "none"
    assert (frame["difference"].notna() == paired).all()
    # Two categories are too few for an interval or a test.
    untested = ["ci_low", "ci_high", "difference_low", "difference_high", "p_value", "p_holm", "non_inferior"]
    assert frame[untested].isna().all(axis=None) and "not estimable" in finished.page
    values = frame.set_index(["method", "metric"])
    for method in METHODS[1:]:
        expected = values.loc[(method, "vendi_score"), "value"] - values.loc[("none", "vendi_score"), "value"]
        assert values.loc[(method, "vendi_score"), "difference"] == pytest.approx(expected, abs=1e-5)
    roles = {"pairwise_distance": "diversity", "vendi_score": "quality"}
    assert frame["primary"].fillna("").tolist() == [roles.get(name, "") for name in frame["metric"]]
    assert frame.loc[paired, ["effect_size", "win_rate"]].notna().all(axis=None)
    assert frame.loc[~paired, ["effect_size", "win_rate", "margin"]].isna().all(axis=None)
    assert frame.loc[paired & (frame["metric"] == "vendi_score"), "margin"].notna().all()
    # Every number is the mean of its groups' values, which are kept to the last digit.
    groups_of_runs = read_groups(plan.results, plan.name)
    for row in frame.itertuples():
        groups = values_of_run(groups_of_runs, row.run_id, row.metric)
        assert [group["n_images"] for group in groups] == [2, 2] and {g["category"] for g in groups} == {"bird", "fish"}
        assert mean_of(groups) == pytest.approx(row.value, rel=1e-5)
    # A repeated command writes the same bytes.
    before = {file: file.read_bytes() for file in plan.result_file().parent.glob("*.*")}
    assert tabulate.write_table(plan)[1] == finished.page
    assert {file: file.read_bytes() for file in before} == before


def test_settings_of_one_method_are_told_apart(finished):
    other = finished.frame[finished.frame["method"] == "negtome"].assign(alpha=0.5, run_id="000000000000")
    table = other_table(pd.concat([finished.frame, other]))
    assert table["metric"].tolist() == ["pairwise similarity"] and len(set(table.columns[5:])) == 4
    assert "negtome alpha 0.5 threshold -1 window 1000 to 0" in table.columns


def test_holm_counts_all_tests_of_a_model_in_the_table(tmp_path):
    row = dict.fromkeys(COLUMNS, 1.0) | {"experiment": "e", "run_id": "0123", "true_cfg_scale": None}
    rows = [
        row | {"model": model, "alpha": alpha, "p_value": p, "primary": primary}
        for model, alpha, p, primary in (
            ("a", 1, 0.01, "diversity"), ("a", 2, 0.02, "quality"), ("a", 3, 0.03, None), ("b", 1, 0.04, "diversity"),
            ("b", 2, None, "diversity"),
        )
    ]  # fmt: skip
    for number, first in enumerate(([], rows[:1], rows)):
        path = tmp_path / f"{number}.csv"
        if first:
            merge_rows(path, [row | {"value": 2.0} for row in first])
        frame = merge_rows(path, rows).sort_values(["model", "alpha"])
        assert frame["p_holm"].tolist() == pytest.approx([0.02, 0.02, np.nan, 0.04, np.nan], nan_ok=True)
        assert set(frame["run_id"]) == {"0123"} and set(frame["value"]) == {1.0}
    # Rows of other settings stay.
    frame = merge_rows(path, [rows[0] | {"alpha": 7}])
    assert sorted(frame.loc[frame["model"] == "a", "alpha"]) == [1, 2, 3, 7]


def test_a_part_of_a_sweep_is_paired_with_its_baseline(finished, tmp_path):
    rows = [row for row in tabulate.rows_of_runs(finished.plan) if row["method"] == "negtome"]
    assert tabulate.rows_of_runs(plan_of(finished.arguments, "negtome")) == rows
    copy_run(finished.folders[1], tmp_path)
    with pytest.raises(FileNotFoundError, match="method=none"):
        tabulate.rows_of_runs(plan_of([*finished.arguments, f"outputs={tmp_path}"], "negtome"))


def test_methods_are_compared_with_each_other_too(finished, capsys):
    plan = finished.plan
    frame, _ = tabulate.write_comparison(plan, "none")
    both = [one[one["primary"].notna()].sort_values(["method", "metric"]) for one in (frame, finished.frame)]
    # Against the baseline it is the table's own comparison.
    for column in ("difference", "p_value", "p_holm", "effect_size", "win_rate"):
        ours, of_table = (one[column].astype(float).tolist() for one in both)
        assert ours == pytest.approx(of_table, rel=1e-5, nan_ok=True), column
    # With the two methods exchanged, the difference changes its sign.
    turned = tabulate.write_comparison(plan, "negtome")[0].set_index(["method", "metric"])["difference"]
    straight = frame.set_index(["method", "metric"])["difference"]
    for metric in both[0]["metric"].unique():
        assert turned["none", metric] == pytest.approx(-straight["negtome", metric])
    assert main(["tabulate", "--against", "negtome", *finished.arguments]) == 0
    path = plan.result_file("against_negtome.md")
    assert capsys.readouterr().out.endswith(f"\n{path}\n")
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 2 and any("negtome_released" in row for row in rows)
    with pytest.raises(ValueError, match=r"expected one of the experiment's methods \(none, negtome, .*got 'cads'"):
        tabulate.write_comparison(plan, "cads")


def test_figures_are_made_from_the_table_and_the_images(finished):
    plan = finished.plan
    files = {file.name: file for file in plot.plot(plan)}
    assert set(files) == {"tradeoff.png", "forest_sdxl.png", "grid_sdxl.webp"}
    with Image.open(files["grid_sdxl.webp"]) as grid:
        assert grid.width > 3 * 2 * 32
    # A figure of the same table stays; one of another table is drawn again.
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files.values()}
    plot.plot(plan)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    text = plan.result_file().read_text()
    frame = finished.frame
    frame.assign(value=frame["value"] + 0.1).to_csv(plan.result_file(), index=False)
    plot.plot(plan)
    plan.result_file().write_text(text)
    assert files["tradeoff.png"].read_bytes() != before[files["tradeoff.png"]][1]


@pytest.mark.slow
def test_flux_schnell_runs_end_to_end(tmp_path, tiny_checkpoint):
    """FLUX.1-dev does in test_sweeps.py."""
    plan = plan_of([*overrides(tmp_path, tiny_checkpoint("flux-schnell"), "flux", "flux-schnell"), "method=negtome"])
    generate(plan)
    evaluate(plan)
    assert "| flux-schnell " in tabulate.write_table(plan)[1]


def test_a_shipped_model_and_its_scorer_need_no_network(tmp_path):
    plan = plan_of([
        "experiment=diversity", "model=mini-flux", "method=none", "workers=1", "prompts.categories=[bird]",
        "model.groups_per_category=1", "model.call.num_inference_steps=1", "metric=core", f"outputs={tmp_path}",
    ])  # fmt: skip
    assert [len(read_manifest(folder)) for folder in generate(plan)] == [4]
    documents = [json.loads(path.read_text()) for path in evaluate(plan)]
    assert {document["metric"] for document in documents} == set(plan.cfg.metric)
    assert {document["encoder"]["name"] for document in documents} == {"mini-clip"}


# --- copyright --------------------------------------------------------------------------------------------------------

CHARACTERS = (
    "{panda: {direct: [a photo of a panda], indirect: [an emoji of bamboo], benign: [a photo of a bus]},"
    " ogre: {direct: [a photo of a ogre], benign: [a photo of a shirt]}}"
)
PROTECTED = PROJECT / "models" / "mini-protected"
#: The methods by kind of checkpoint: all of the experiment among the slow tests only.
COPYRIGHT_METHODS = {"sdxl": ["none", "negtome_reference", "negtome_and_negative_prompt", "negtome_reference_released"]}
COPYRIGHT_METHODS["flux"] = ["none", "negative_prompt", *COPYRIGHT_METHODS["sdxl"][1:]]


@pytest.fixture(scope="module")
def copyright_runs(tmp_path_factory, tiny_checkpoint):
    """Run the copyright experiment with two characters, two images of each as references and two to score.

    `copyright_runs(kind)` returns the plan and each method's run folder.
    """

    @functools.cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        for use, character in product(("guidance", "scoring"), ("panda", "ogre")):
            (folder / use / character).mkdir(parents=True)
            images = [file for file in sorted((PROTECTED / use / character).glob("*.png")) if ".mask" not in file.name]
            for image in images[:2]:
                for file in image.parent.glob(f"{image.stem}.*"):
                    shutil.copy(file, folder / use / character)
        plan = plan_of([
            "experiment=copyright", f"method={','.join(COPYRIGHT_METHODS[kind])}",
            *tiny(folder, tiny_checkpoint(kind), kind),
            f"model.copyright.guidance={folder / 'guidance'}", f"model.copyright.scoring={folder / 'scoring'}",
            f"model.copyright.held_out={PROTECTED / 'held_out'}", f"model.reference_images={PROTECTED / 'held_out'}",
            "model.copyright.seeds=[0]", "scorer@scorers.efflite0_40=pixel",
            "model.copyright.images_per_prompt=2", "model.copyright.thresholds.prompt=0.6",
            f"prompts.characters={CHARACTERS}", "scorer@model.scorer=mini-clip",
            "scorer@model.copyright.encoder=pixel", "scorer@model.copyright.second=pixel",
        ])  # fmt: skip
        return plan, dict(zip([spec.cfg.method.name for spec in plan.runs], generate(plan), strict=True))

    return run


@pytest.fixture(scope="module")
def scored(copyright_runs):
    """The same of SDXL with its table; the plan, each method's run folder, and the page."""
    plan, runs = copyright_runs("sdxl")
    evaluate(plan)
    return plan, runs, tabulate.write_table(plan)[1]


def of_method(plan, name, changes):
    """Return the plan of one method's run, with other settings."""
    (cfg,) = (spec.cfg for spec in plan.runs if spec.cfg.method.name == name)
    return plan_from(changed(cfg, changes))


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_the_copyright_experiment_pushes_direct_prompts_and_leaves_benign_ones_alone(kind, copyright_runs):
    runs = dict(copyright_runs(kind)[1])
    assert list(runs) == COPYRIGHT_METHODS[kind]
    none = runs.pop("none")
    assert all(row.references is None for row in read_manifest(none))
    for method, run in runs.items():
        for row in read_manifest(run):
            prompts = row.prompt_id.partition("-")[0]
            same = (run / row.path).read_bytes() == (none / row.path).read_bytes()
            if prompts == "benign":
                assert row.references == {} and same, (method, row.path)
            elif prompts == "direct":
                # The references are of the named concept, each with the cosine by which it was found.
                scores = list(row.references.values())
                assert {name.split("/")[0] for name in row.references} == {row.category}
                assert len(scores) == (1 if method.endswith("released") else 2) and 1 > max(scores) > 0.6
                # A pipeline of random weights hardly follows a text, but does follow a reference image.
                assert not same or method == "negative_prompt", (method, row.path)
        if "negtome" in method:
            counts = [log.get("tokens_pushed") for log in Run(run).statistics()]
            assert any(counts) and None in counts, "attached only where a concept was found"


@pytest.mark.slow
def test_the_copyright_table_has_every_configured_number(scored):
    plan, runs, page = scored
    frame = pd.read_csv(plan.result_file(), dtype=TEXT)
    assert list(frame.columns) == [column for column in COLUMNS if column in REQUIRED or column in frame]
    assert list(frame["run_id"].unique()) == [run.name for run in runs.values()]
    assert set(frame["primary"].dropna()) == {"resemblance", "quality"}
    assert (frame["seconds"] > 0).all() and (frame["difference"].notna() == (frame["method"] != "none")).all()
    references = frame[frame["method"] == "negtome_reference"]
    assert set(references["reference"]) == {"assets"} and (references["pushed_share"] > 0).all()
    expected = {f"detection rate {kind} (down)" for kind in ("direct", "indirect")}
    expected |= {f"detection rate direct: {column}" for column in ("p", "d_z", "win rate")}
    assert {*expected, "clip score unnamed (up)", "realism direct: non-inferior", "seconds"} <= set(
        main_table(frame).columns
    )
    assert f"| {plan.cfg.model.name} " in page
    with Image.open(next(file for file in plot.plot(plan) if file.name == "grid_sdxl.webp")) as grid:
        assert grid.height > 2 * 32
    for run in runs.values():
        documents = [json.loads(path.read_text()) for path in (run / "metrics").iterdir()]
        by_name = {document["metric"]: document for document in documents}
        assert set(by_name) == set(plan.cfg.metric)
        assert (by_name["maximum_resemblance"]["n_groups"], by_name["clip_score_benign"]["n_groups"]) == (3, 2)
        assert by_name["identification"]["details"]["n_assets"] == 2
        assert by_name["detection_rate_direct"]["details"]["n_negative"] >= 19
        assert by_name["changed_share_benign"]["value"] == by_name["change_benign"]["value"] == 0
        assert by_name["changed_share_benign"]["encoder"]["id"] == "pixels"
        assert by_name["maximum_resemblance"]["encoder"]["id"] == "pixels-8x8"
        assert by_name["clip_score_unnamed"]["encoder"]["name"] == "mini-clip"


def test_an_interrupted_run_goes_on_where_it_stopped(copyright_runs, tmp_path):
    plan, runs = copyright_runs("sdxl")
    run = runs["negtome_and_negative_prompt"]
    folder = copy_run(run, tmp_path)
    for name in ("complete", "manifest.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "images" / "direct-a-photo-of-a-panda" / "000000")
    (folder / "images" / "direct-a-photo-of-a-panda" / ".000000.left-by-a-killed-process").mkdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    part = of_method(plan, "negtome_and_negative_prompt", {"outputs": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="is unfinished or gone: run python"):
        Run.of(part.runs[0])
    assert generate(part) == [folder]
    assert pngs(folder) == pngs(run) and len(kept) == len(pngs(run)) - 2
    assert (folder / "manifest.jsonl").read_bytes() == (run / "manifest.jsonl").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and not list(folder.glob("images/*/.*"))


def test_a_method_with_references_is_built_once_for_all_runs_of_a_model(copyright_runs, tmp_path, monkeypatch):
    """It holds an encoder and the images' embeddings, which do not depend on the runs' other settings."""
    plan, _ = copyright_runs("sdxl")
    (cfg,) = (spec.cfg for spec in plan.runs if spec.cfg.method.name == "negtome_reference")
    cfg = changed(cfg, {"prompts.kinds": ["indirect"], "outputs": str(tmp_path)})
    built = []
    monkeypatch.setattr("experiments.runs.workers.build", lambda spec: built.append(spec.get("name")) or build(spec))
    generate(plan_from(*(changed(cfg, {"model.call.guidance_scale": scale}) for scale in (2, 3))))
    assert built.count("negtome_reference") == 1


@pytest.mark.slow
def test_without_reference_images_the_errors_say_which_settings_to_add(scored, tmp_path):
    plan, _, _ = scored

    def configured(key, value, images=None):
        changes = {f"model.copyright.{key}": value, "outputs": str(tmp_path), "images": images}
        return of_method(plan, "negtome_reference", changes)

    guidance = plan.cfg.model.copyright.guidance
    for key, value, error, message in (
        ("guidance", None, FileNotFoundError, r"^No protected assets .*model\.copyright\.guidance=FOLDER"),
        ("guidance", str(tmp_path / "absent"), FileNotFoundError, r"absent, which does not exist"),
        ("scoring", guidance, ValueError, r"^\d+ of the pictures that methods are given are also scored against"),
    ):
        with pytest.raises(error, match=message):
            generate(configured(key, value))
    # Without images to score, metrics that compare with them are left out, and so is the claim.
    cfg = configured("scoring", None, images=str(tmp_path)).cfg
    assert not any(
        name.startswith(("detection", "maximum", "mean", "any", "excess", "floor")) for name in measured(cfg)
    )
    assert {f"clip_score_{kind}" for kind in ("direct", "unnamed", "indirect", "benign")} <= set(measured(cfg))
    (line,) = [line for line in left_out_lines([cfg]) if "maximum_resemblance," in line]
    assert "model.copyright.scoring=FOLDER" in line
    with pytest.raises(ValueError, match=r"primary\.resemblance .*'detection_rate_direct'"):
        tabulate.rows_of_runs(configured("scoring", None))
