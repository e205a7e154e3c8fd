"""From a command line to a table, on tiny checkpoints laid out like the real ones: what a user does, for real."""

import functools
import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image
from plans import plan_of

import experiments
from eval.features import EffNetLite0
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.intervals import mean_of
from experiments import PROJECT, plot, tabulate
from experiments.__main__ import main
from experiments.configs import build
from experiments.evaluate import evaluate, evaluate_folder
from experiments.generate import generate
from experiments.plan import expand
from experiments.runs.identity import request
from experiments.runs.metrics import left_out_lines, measured
from experiments.runs.store import Run
from experiments.tables.columns import COLUMNS, REQUIRED, TEXT
from experiments.tables.groups import read_groups, values_of_run
from experiments.tables.pages import main_table, other_table

METHODS = "method=none,negtome,negtome_released"


def checkpoint(source, kind="sdxl", name=None):
    """A real model's configuration, but with a tiny checkpoint in the real layout, two steps and a few pixels."""
    size = {
        "sdxl": ["model.call.height=32", "model.call.width=32"],
        "flux": ["model.call.height=16", "model.call.width=16"],
    }
    return [
        f"model={name or {'sdxl': 'sdxl', 'flux': 'flux-dev'}[kind]}",
        f"model.source={source}",
        "model.dtype=float32",
        "model.call.num_inference_steps=2",
        *size[kind],
        *(["model.call.max_sequence_length=32"] if kind == "flux" else []),
    ]


@pytest.fixture(scope="module", autouse=True)
def _tiny_strengths():
    """Strengths of every method on a tiny checkpoint: every token is pushed in every step."""

    def strength(setting, *, _parent_, _root_):
        if _root_.model.kind == "mini":
            return experiments._strength(setting, _parent_=_parent_, _root_=_root_)
        flux = _root_.model.architecture == "flux"
        tiny = {"alpha": 0.9, "timestep_range": [0, 1000], "threshold": -1, "min_side": None if flux else 4,
                "true_cfg_scale": 2.0 if flux else None}  # fmt: skip
        return tiny[setting]

    OmegaConf.register_new_resolver("strength", strength, replace=True)
    yield
    OmegaConf.register_new_resolver("strength", experiments._strength, replace=True)


def overrides(tmp_path, source, kind="sdxl", name=None):
    """The diversity experiment as small as it can be: two prompts, one seed, two images, two steps."""
    return [
        "experiment=diversity",
        *checkpoint(source, kind, name),
        "prompts.categories=[bird,fish]",
        "prompts.templates=[a photo of a]",
        "prompts.seeds=[0]",
        "prompts.images_per_prompt=2",
        "prompts.groups_per_category=null",
        "metric=core",
        "scorer@model.scorer=pixel",
        "~metric.clip_score",
        "primary.quality=vendi_score",
        "bootstrap.n_resamples=100",
        f"outputs={tmp_path / 'outputs'}",
        f"results={tmp_path / 'results'}",
    ]


def copied(run, outputs):
    """Copy a run and what names it to other outputs; returns its folder there."""
    for file in run.parents[1].glob("*/plan.json"):
        (outputs / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, outputs / file.parent.name)
    return shutil.copytree(run, outputs / "runs" / run.name)


def pngs(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint):
    """One whole experiment on a tiny SDXL checkpoint: overrides and the three run folders."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*overrides(folder, tiny_checkpoint("sdxl")), METHODS]
    plan = plan_of(arguments)
    folders = generate(plan)
    evaluate(plan)
    return arguments, folders


def test_the_first_image_of_a_group_is_the_baselines_and_the_second_is_pushed(finished):
    _, (none, paper, released) = finished
    for folder in (paper, released):
        for row in read_manifest(folder):
            same = (folder / row.path).read_bytes() == (none / row.path).read_bytes()
            assert same == (row.index == 0), row.path


def test_the_manifest_names_every_image_and_its_seed(finished):
    _, folders = finished
    manifests = [read_manifest(folder) for folder in folders]
    assert len({str([replace(row, sha256=None) for row in manifest]) for manifest in manifests}) == 1
    assert [(row.prompt, row.category, row.group_seed, row.index) for row in manifests[0]] == [
        ("a photo of a bird", "bird", 0, 0),
        ("a photo of a bird", "bird", 0, 1),
        ("a photo of a fish", "fish", 0, 0),
        ("a photo of a fish", "fish", 0, 1),
    ]
    for folder in folders:
        assert set(pngs(folder)) == {read.relative_to(folder) for read in (folder / row.path for row in manifests[0])}


def test_the_log_of_a_group_says_how_many_tokens_were_pushed(finished):
    _, (none, paper, _) = finished
    statistics = {
        folder: json.loads(next(folder.glob("images/*/000000/group.json")).read_text())["stats"]
        for folder in (none, paper)
    }
    assert set(statistics[none]) == {"seconds"}
    assert 0 < statistics[paper]["tokens_pushed"] <= statistics[paper]["tokens_compared"]


def test_a_complete_run_is_not_generated_again(finished, monkeypatch):
    arguments, folders = finished
    before = [pngs(folder) for folder in folders]
    monkeypatch.setattr("experiments.runs.checkpoints.load", lambda *a, **k: pytest.fail("loaded a pipeline"))
    assert generate(plan_of(arguments)) == folders
    assert [pngs(folder) for folder in folders] == before


def test_an_interrupted_run_finishes_the_rest_and_equals_an_undisturbed_one(finished, tmp_path):
    arguments, (_, paper, _) = finished
    plan_arguments = [*arguments, "method=negtome", f"outputs={tmp_path}"]
    folder = copied(paper, tmp_path)
    shutil.rmtree(next(folder.glob("images/*fish/000000")))
    for name in ("complete", "manifest.jsonl"):
        (folder / name).unlink()
    (folder / "images" / "a-photo-of-a-fish" / ".000000.left-by-a-killed-process").mkdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    plan = plan_of(plan_arguments, "negtome")
    with pytest.raises(FileNotFoundError, match="is unfinished or gone: run python"):
        Run.of(plan.runs[0])
    assert generate(plan) == [folder]
    assert pngs(folder) == pngs(paper)
    assert (folder / "manifest.jsonl").read_bytes() == (paper / "manifest.jsonl").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.glob("images/*/.*"))


def test_every_setting_that_affects_pixels_makes_a_run_of_its_own(finished, tmp_path, tiny_checkpoint):
    arguments, folders = finished
    other_weights = tmp_path / "weights"
    shutil.copytree(tiny_checkpoint("sdxl"), other_weights)
    weights = other_weights / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)

    def identity(*changes):
        from experiments.runs.checkpoints import find_checkpoint

        (cfg,) = expand([*arguments, "method=negtome", f"outputs={tmp_path}", *changes])
        return Run.plan(cfg, find_checkpoint(cfg.model).fingerprint, "cpu")[0].id

    assert identity() == folders[1].name
    ids = [
        identity(change)
        for change in (
            "method.alpha=0.5",
            "method.threshold=0.1",
            "method.timestep_range=[500,1000]",
            "method.reference=others",
            "model.call.guidance_scale=2",
            "model.call.num_inference_steps=3",
            "prompts.seeds=[1]",
            "prompts.images_per_prompt=3",
            f"model.source={other_weights}",
        )
    ]
    assert len({identity(), *ids}) == len(ids) + 1
    # What does not affect pixels does not make another run.
    assert identity("bootstrap.seed=1", "results=elsewhere") == folders[1].name


def test_an_edited_run_folder_is_refused(finished, tmp_path):
    arguments, (none, _, _) = finished
    folder = copied(none, tmp_path)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("num_inference_steps: 2", "num_inference_steps: 50"))
    with pytest.raises(ValueError, match="does not hash to its folder's name"):
        Run.of(plan_of([*arguments, "method=none", f"outputs={tmp_path}"]).runs[0])


def test_the_table_holds_every_run_and_metric_with_n_and_paired_intervals(finished):
    arguments, folders = finished
    _, markdown = tabulate.write_table(plan_of(arguments))
    cfg = expand(arguments)[0]
    frame = pd.read_csv(f"{cfg.results}/diversity/table.csv", dtype=TEXT)
    assert list(frame.columns) == [column for column in COLUMNS if column in REQUIRED or column in frame]
    assert list(frame["run_id"].unique()) == [folder.name for folder in folders]
    assert set(frame["metric"]) == {"pairwise_similarity", "pairwise_distance", "vendi_score"}
    assert (frame["n_groups"] == 2).all() and (frame["n_images"] == 4).all()
    assert set(frame["encoder"]) == {"pixels-8x8"}
    paired = frame["method"] != "none"
    assert (frame["difference"].notna() == paired).all()
    # Of two categories nothing is known about others.
    assert (frame["n_units"] == 2).all()
    assert frame[["ci_low", "ci_high", "difference_low", "difference_high"]].isna().all(axis=None)
    values = frame.set_index(["method", "metric"])
    for method in ("negtome", "negtome_released"):
        expected = values.loc[(method, "vendi_score"), "value"] - values.loc[("none", "vendi_score"), "value"]
        assert values.loc[(method, "vendi_score"), "difference"] == pytest.approx(expected, abs=1e-5)
    roles = {"pairwise_distance": "diversity", "vendi_score": "quality"}
    assert frame["primary"].fillna("").tolist() == [roles.get(name, "") for name in frame["metric"]]
    assert frame[["p_value", "p_holm"]].isna().all(axis=None)
    assert frame.loc[paired, ["effect_size", "win_rate"]].notna().all(axis=None)
    assert frame.loc[~paired, ["effect_size", "win_rate", "margin", "non_inferior"]].isna().all(axis=None)
    assert frame.loc[paired & (frame["metric"] == "vendi_score"), "margin"].notna().all()
    assert frame["non_inferior"].isna().all() and "not estimable" in markdown
    assert "0.812" in markdown and "sdxl" in markdown
    assert "- sdxl, NegToMe, released matching: " in markdown and "All other metrics" in markdown
    # Every number is the mean of its groups' values, which are kept to the last digit.
    plan = plan_of(arguments)
    for row in frame.itertuples():
        groups = values_of_run(read_groups(cfg.results, "diversity"), row.run_id, row.metric)
        assert [group["n_images"] for group in groups] == [2, 2] and {g["category"] for g in groups} == {"bird", "fish"}
        assert mean_of(groups) == pytest.approx(row.value, rel=1e-5)
    # Made again, all files are the same to the byte.
    before = {file: file.read_bytes() for file in plan.result_file().parent.glob("*.*")}
    assert tabulate.write_table(plan)[1] == markdown
    assert {file: file.read_bytes() for file in before} == before


def test_rows_of_other_settings_stay(finished):
    arguments, _ = finished
    path = plan_of(arguments).results / "kept.csv"
    row = dict.fromkeys(COLUMNS, 1.0) | {"experiment": "kept", "run_id": "0123", "true_cfg_scale": None}
    tabulate.merge_rows(path, [row | {"alpha": 0.3, "value": 1}, row | {"alpha": 0.9, "value": 2}])
    frame = tabulate.merge_rows(path, [row | {"alpha": 0.9, "value": 3}])
    assert frame[["alpha", "value", "run_id"]].values.tolist() == [[0.3, 1, "0123"], [0.9, 3, "0123"]]


def test_holm_counts_all_tests_of_a_model_in_the_table(tmp_path):
    row = dict.fromkeys(COLUMNS, 1.0) | {"experiment": "e", "run_id": "0123", "primary": "diversity"}
    rows = [
        row | {"model": model, "alpha": alpha, "p_value": p, "primary": primary}
        for model, alpha, p, primary in (
            ("a", 1, 0.01, "diversity"),
            ("a", 2, 0.02, "quality"),
            ("a", 3, 0.03, None),
            ("b", 1, 0.04, "diversity"),
            ("b", 2, None, "diversity"),
        )
    ]
    expected = [0.02, 0.02, None, 0.04, None]
    for first in ([], rows[:1], rows):
        path = tmp_path / f"{len(first)}.csv"
        tabulate.merge_rows(path, first) if first else None
        frame = tabulate.merge_rows(path, rows)
        found = dict(zip(zip(frame["model"], frame["alpha"], strict=True), frame["p_holm"], strict=True))
        assert [found[row["model"], row["alpha"]] for row in rows] == pytest.approx(
            [float("nan") if p is None else p for p in expected], nan_ok=True
        )


def test_settings_of_one_method_are_told_apart(finished):
    arguments, _ = finished
    tabulate.write_table(plan_of(arguments))
    frame = pd.read_csv(f"{expand(arguments)[0].results}/diversity/table.csv", dtype=TEXT)
    other = frame[frame["method"] == "negtome"].assign(alpha=0.5, run_id="000000000000")
    table = other_table(pd.concat([frame, other]))
    assert list(table.columns)[5:] == [
        "none",
        "negtome alpha 0.9 threshold -1 window 1000 to 0",
        "negtome_released",
        "negtome alpha 0.5 threshold -1 window 1000 to 0",
    ]
    assert table["metric"].tolist() == ["pairwise similarity"]


def test_a_part_of_a_sweep_finds_its_baseline(finished, tmp_path):
    arguments, _ = finished
    whole = tabulate.rows_of_runs(plan_of(arguments))
    part = tabulate.rows_of_runs(plan_of(arguments, "negtome"))
    assert part == [row for row in whole if row["method"] == "negtome"]


def test_a_method_without_its_baseline_is_refused(finished, tmp_path):
    arguments, (_, paper, _) = finished
    copied(paper, tmp_path)
    with pytest.raises(FileNotFoundError, match="method=none"):
        tabulate.rows_of_runs(plan_of([*arguments, f"outputs={tmp_path}"], "negtome"))


def test_runs_of_earlier_weights_do_not_stand_in_the_way(finished, tmp_path):
    arguments, _ = finished
    weights = tmp_path / "weights"
    shutil.copytree(expand(arguments)[0].model.source, weights)
    plan = plan_of([*arguments, "method=none", f"outputs={tmp_path}", f"model.source={weights}"])
    first = generate(plan)
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    second = generate(plan)
    assert first != second
    assert [Run.of(spec).folder for spec in plan.runs] == second


def test_methods_are_compared_with_each_other_too(finished, capsys):
    arguments, _ = finished
    plan = plan_of(arguments)
    frame, _ = tabulate.write_comparison(plan, "none")
    table, _ = tabulate.write_table(plan)
    both = [one[one["primary"].notna()].sort_values(["method", "metric"]) for one in (frame, table)]
    # Against the run without a method it is the table's own comparison.
    for column in ("difference", "p_value", "p_holm", "effect_size", "win_rate"):
        ours, theirs = (one[column].astype(float).tolist() for one in both)
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True), column
    # The other way round everything is the other way round.
    turned = tabulate.write_comparison(plan, "negtome")[0].set_index(["method", "metric"])["difference"]
    straight = frame.set_index(["method", "metric"])["difference"]
    for metric in both[0]["metric"].unique():
        assert turned["none", metric] == pytest.approx(-straight["negtome", metric])
    assert main(["tabulate", "--against", "negtome", *arguments]) == 0
    path = plan.result_file("against_negtome.md")
    assert capsys.readouterr().out.endswith(f"\n{path}\n")
    text = path.read_text()
    assert text.startswith("# diversity against negtome\n") and "negtome_released" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 2 * 2
    with pytest.raises(ValueError, match=r"expected one of the experiment's methods \(none, negtome, .*got 'cads'"):
        tabulate.write_comparison(plan, "cads")


def test_figures_are_made_from_the_table_and_the_images(finished):
    arguments, _ = finished
    plan = plan_of(arguments)
    tabulate.write_table(plan)
    files = {file.name: file for file in plot.plot(plan)}
    assert set(files) == {"tradeoff.png", "forest_sdxl.png", "grid_sdxl.webp"}
    with Image.open(files["grid_sdxl.webp"]) as grid:
        assert grid.width > 3 * 2 * 32
    # A figure of the same table stays; one of another table is drawn anew.
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files.values()}
    plot.plot(plan)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    table = plan.result_file()
    text = table.read_text()
    frame = pd.read_csv(table, dtype=TEXT)
    frame.assign(value=frame["value"] + 0.1).to_csv(table, index=False)
    plot.plot(plan)
    assert files["tradeoff.png"].read_bytes() != before[files["tradeoff.png"]][1]
    table.write_text(text)


def test_flux_schnell_runs_end_to_end(tmp_path, tiny_checkpoint):
    """FLUX.1-dev does in test_sweeps.py."""
    asked = overrides(tmp_path, tiny_checkpoint("flux-schnell"), "flux", "flux-schnell")
    plan = plan_of([*asked, "method=none,negtome"])
    generate(plan)
    evaluate(plan)
    assert "| flux-schnell " in tabulate.write_table(plan)[1]


def test_a_push_that_cannot_happen_stops_the_run(finished, tmp_path):
    arguments, _ = finished
    changes = ["method=negtome", "method.timestep_range=[999.5,1000]", f"outputs={tmp_path}"]
    with pytest.raises(RuntimeError, match="timestep_range"):
        generate(plan_of([*arguments, *changes], "negtome"))


def test_the_command_line_sweeps(tmp_path, tiny_checkpoint):
    swept = ["method=negtome", "method.alpha=0.3,0.9", "method.threshold=-1,-0.5", "prompts.categories=[bird]"]
    assert main(["generate", "-m", *overrides(tmp_path, tiny_checkpoint("sdxl")), *swept]) == 0
    runs = [Run(run) for run in (tmp_path / "outputs" / "runs").glob("[!.]*")]
    found = [run.identity["request"]["method"]["settings"] for run in runs]
    settings = {(one["alpha"], one["threshold"]) for one in found if one}
    assert settings == {(0.3, -1), (0.3, -0.5), (0.9, -1), (0.9, -0.5)}
    assert len(runs) == 5 and all(run.complete for run in runs)


def test_a_shipped_model_and_its_scorer_need_no_network(tmp_path):
    plan = plan_of([
        "experiment=diversity", "model=mini-flux", "method=negtome", "workers=1", "prompts.categories=[bird]",
        "model.groups_per_category=2", "model.call.num_inference_steps=2", "method.timestep_range=[0,1000]",
        "metric=core", f"outputs={tmp_path}",
    ], "negtome")  # fmt: skip
    assert [len(read_manifest(folder)) for folder in generate(plan)] == [2 * 4]
    documents = [json.loads(path.read_text()) for path in evaluate(plan)]
    assert {document["metric"] for document in documents} == set(plan.cfg.metric)
    assert {document["encoder"]["name"] for document in documents} == {"mini-clip"}


def plain_folder(folder, prompts=("bird", "fish"), images=3):
    """Images of two prompts, as anybody's folder: numbered, no manifest."""
    for number, prompt in enumerate(prompts):
        (folder / prompt).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (8, 8), (40 * number, 60 * index, 9)).save(folder / prompt / f"{index}.png")
    return folder


def test_any_folder_of_images_is_scored(tmp_path, monkeypatch, capsys, caplog):
    """Named from where the command is called."""
    caplog.set_level("INFO", "experiments")
    folder = plain_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    asked = ["images=mine", "metric=core", "scorer@model.scorer=pixel", f"outputs={tmp_path / 'outputs'}"]
    assert main(["evaluate", *asked, "bootstrap.n_resamples=100"]) == 0
    said = capsys.readouterr().out
    table = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert "pixels-8x8" in table["pairwise_distance"]
    document = json.loads((folder / "metrics" / "pairwise_distance-pixels-8x8.json").read_text())
    assert f"| {document['value']:.4g} " in table["pairwise_distance"]
    assert document["n_groups"] == 2
    # What cannot be measured says why, and keeps nothing else from being measured.
    assert "clip_score" not in table
    assert "Not measured: clip_score: expected an encoder with a text tower" in said
    # The default is a mini model, whose scorer knows no photographs.
    assert "model=mini-sdxl" in said + caplog.text and "emoji artwork alone" in said + caplog.text


def test_controls_of_a_folder_show_that_mirroring_counts_as_diversity_unless_it_is_averaged(tmp_path):
    rng = np.random.default_rng(0)
    for prompt in ("bird", "fish", "boat", "tree"):
        (tmp_path / "mine" / prompt).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), 0).save(tmp_path / "mine" / prompt / f"{index}.png")
    changes = ["metric=fair", "~metric.clip_score", "~metric.realism_efflite0_40", "scorer@model.scorer=pixel"]
    settings = [f"images={tmp_path / 'mine'}", f"outputs={tmp_path / 'outputs'}", "bootstrap.n_resamples=100"]
    (cfg,) = expand([*settings, *changes, "controls=true"])
    table = evaluate_folder(cfg)[0].set_index("metric")
    mirrored = {name: float(text.split()[0]) for name, text in table["mirrored"].items()}
    assert mirrored["pairwise_distance"] != 0
    assert mirrored["pairwise_distance_averaged"] == pytest.approx(0, abs=1e-6)
    assert table[["shifted", "blurred", "noisy"]].map(lambda text: text.endswith("]")).all(axis=None)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["bird", "boat", "fish", "metrics", "tree"]


def test_the_scores_of_a_folder_go_where_they_are_sent(tmp_path):
    folder = plain_folder(tmp_path / "mine")
    changes = ["metric=tune", "scorer@model.scorer=pixel", f"outputs={tmp_path / 'outputs'}"]
    (cfg,) = expand([f"images={folder}", f"scores={tmp_path / 'scores'}", *changes])
    table, refused = evaluate_folder(cfg)
    assert (table["metric"].tolist(), list(refused)) == (["pairwise_distance"], ["clip_score"])
    assert {path.name for path in folder.iterdir()} == {"bird", "fish"}
    before = {path: path.read_bytes() for path in (tmp_path / "scores").iterdir()}
    assert [path.name for path in before] == ["pairwise_distance-pixels-8x8.json"]
    # Scored again: the same. With another image: anew.
    assert evaluate_folder(cfg)[0].equals(table)
    Image.new("RGB", (8, 8), "white").save(folder / "bird" / "new.png")
    changed, _ = evaluate_folder(cfg)
    assert changed["images"].tolist()[0] == "7" and changed["value"][0] != table["value"][0]


def test_prompts_that_are_cut_are_announced(tmp_path, caplog):
    folder = plain_folder(tmp_path / "mine")
    (folder / "prompts.json").write_text(json.dumps({"bird": "a photo of a bird " * 60}))
    (cfg,) = expand([f"images={folder}", "metric=tune", f"outputs={tmp_path / 'outputs'}"])
    for _ in range(2):  # measured, and there already
        caplog.clear()
        evaluate_folder(cfg)
        assert "clip_score by mini-clip: 1 of 2 prompts are longer than it reads" in caplog.text


def test_folders_that_cannot_be_scored_say_why(tmp_path):
    def score(folder, **options):
        changes = ["metric=tune", "scorer@model.scorer=pixel", f"outputs={tmp_path / 'outputs'}"]
        return evaluate_folder(expand([f"images={folder}", *changes])[0])

    with pytest.raises(FileNotFoundError, match=r"absent.*does not exist"):
        score(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="one subfolder of images a prompt"):
        score(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least 2 images in every group"):
        score(plain_folder(tmp_path / "single", images=1))
    damaged = plain_folder(tmp_path / "damaged")
    (damaged / "bird" / "1.png").write_bytes((damaged / "bird" / "1.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"damaged or foreign file.*bird/1\.png"):
        score(damaged)


def released(tmp_path, *changes):
    """Score three kinds of textures, 8 of each, by the suite of the paper's own numbers: table and refusals."""
    rng = np.random.default_rng(0)
    for use, number in product(("made", "real"), range(24)):
        file = tmp_path / use / ("bird", "dog", "bus")[number // 8] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(4 + number // 8, 5, 3), dtype=np.uint8)).resize((70, 60)).save(file)
    real = f"model.reference_images={tmp_path / 'real'}"
    asked = [f"images={tmp_path / 'made'}", "metric=released", real, f"outputs={tmp_path / 'outputs'}", *changes]
    return evaluate_folder(expand(asked)[0])


def test_the_papers_own_numbers_need_weights_and_say_which(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.weights.network_answers", lambda _: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="No configured metric") as error:
        released(tmp_path, "model=sdxl")
    reasons = str(error.value).splitlines()[1:]
    assert len(reasons) == 4
    for name in ("dreamsim", "entropy", "inception_score", "fid"):
        (reason,) = (line for line in reasons if line.startswith(f"Not measured: released_{name}: "))
        assert "expected the weights of" in reason and "no download" in reason


@pytest.mark.slow
def test_the_papers_own_numbers_are_their_formulas(tmp_path):
    """With the networks that are here in the place of those whose weights are not."""
    table, refused = released(
        tmp_path, "model=mini-sdxl", "scorer@scorers.dreamsim=efficientnet-lite0",
        "scorer@scorers.inception_torchvision=efficientnet-lite0", "metric.released_inception_score.splits=2",
        "scorer@scorers.inception_released=efficientnet-lite0-40", "scorers.inception_released.channels=16",
    )  # fmt: skip
    assert not refused and not table["value"].isna().any()
    documents = [json.loads(path.read_text()) for path in (tmp_path / "made" / "metrics").iterdir()]
    found = {document["metric"]: document for document in documents}
    made, real = (ImageSet.open(tmp_path / use) for use in ("made", "real"))

    x = made.embeddings(EffNetLite0()).double()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    cosine = unit @ unit.T
    of_prompts = [np.tril(cosine[k : k + 8, k : k + 8], -1).sum() / 28 for k in (0, 8, 16)]
    assert found["released_dreamsim"]["value"] == pytest.approx(np.mean(of_prompts), rel=1e-6)

    p = EffNetLite0().logits_from_features(x.float()).double().softmax(dim=1).numpy()
    parts = [np.exp(np.mean([(row * np.log(row / part.mean(0))).sum() for row in part])) for part in (p[:12], p[12:])]
    assert found["released_inception_score"]["value"] == pytest.approx(np.mean(parts), rel=1e-6)

    a, b = (images.embeddings(EffNetLite0(channels=16)).double().numpy() for images in (made, real))
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real.sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * roots
    assert found["released_fid"]["value"] == pytest.approx(distance, rel=1e-6)

    shares = [np.array([*group["counts"].values()]) / 8 for group in found["released_entropy"]["groups"]]
    assert len(shares) == 3
    assert found["released_entropy"]["value"] == pytest.approx(np.mean([-(s * np.log(s)).sum() for s in shares]))
    assert len(found["released_entropy"]["settings"]["templates"]) == 80


def test_without_real_images_what_compares_with_them_is_left_out(tmp_path):
    changes = ["metric=full", "model=sdxl", f"outputs={tmp_path / 'outputs'}"]
    (cfg,) = expand([f"images={tmp_path}", *changes])
    names = measured(cfg)
    absent = [name for name in cfg.metric if name not in names]
    assert absent == [name for name, spec in cfg.metric.items() if "reference" in spec]
    (line,) = left_out_lines([cfg, cfg])
    assert ", ".join(absent) in line and "model.reference_images=FOLDER" in line


# --- copyright --------------------------------------------------------------------------------------------------------

CHARACTERS = (
    "{panda: {direct: [a photo of a panda], indirect: [an emoji of bamboo], benign: [a photo of a bus]},"
    " ogre: {direct: [a photo of a ogre], benign: [a photo of a shirt]}}"
)
PROTECTED = PROJECT / "models" / "mini-protected"


def copyright_overrides(tmp_path, source, kind="sdxl"):
    """The copyright experiment with two characters, two pictures of each to push away from and others to score."""
    for use in ("guidance", "scoring"):
        for character in ("panda", "ogre"):
            files = sorted((PROTECTED / use / character).glob("*.png"))
            chosen = [file for file in files if not file.stem.endswith(".mask")][:2]
            (tmp_path / use / character).mkdir(parents=True, exist_ok=True)
            for file in (file for file in files if any(file.name.startswith(picture.stem) for picture in chosen)):
                shutil.copy(file, tmp_path / use / character)
    return [
        "experiment=copyright",
        *checkpoint(source, kind),
        f"model.copyright.guidance={tmp_path / 'guidance'}",
        f"model.copyright.scoring={tmp_path / 'scoring'}",
        f"model.copyright.held_out={PROTECTED / 'held_out'}",
        f"model.reference_images={PROTECTED / 'held_out'}",
        "model.copyright.seeds=[0]",
        "model.copyright.images_per_prompt=2",
        "model.copyright.thresholds.prompt=0.6",
        f"prompts.characters={CHARACTERS}",
        "scorer@model.scorer=mini-clip",
        "scorer@model.copyright.encoder=pixel",
        "scorer@model.copyright.second=pixel",
        "scorer@scorers.efflite0_40=pixel",
        "bootstrap.n_resamples=100",
        f"outputs={tmp_path / 'outputs'}",
        f"results={tmp_path / 'results'}",
    ]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_checkpoint):
    """Generate the copyright experiment on a tiny checkpoint of a kind, once: overrides, and each method's run."""

    @functools.cache
    def generated(kind):
        arguments = copyright_overrides(tmp_path_factory.mktemp(kind), tiny_checkpoint(kind), kind)
        plan = plan_of(arguments)
        methods = [spec.cfg.method.name for spec in plan.runs]
        return arguments, dict(zip(methods, generate(plan), strict=True))

    return generated


@pytest.fixture(scope="module")
def protected(guarded):
    """The same of SDXL, scored, which knows no architecture: and each method's documents."""
    arguments, runs = guarded("sdxl")
    documents = {
        method: {path.name: json.loads(path.read_text()) for path in evaluate(plan_of(arguments, method))}
        for method in runs
    }
    return arguments, {method: (run, documents[method]) for method, run in runs.items()}


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_the_copyright_experiment_pushes_from_what_is_asked_for_and_leaves_neighbours_alone(kind, guarded):
    _, runs = guarded(kind)
    assert list(runs) == ["none", "negative_prompt", "negtome_reference", "negtome_and_negative_prompt",
                          "negtome_reference_released"]  # fmt: skip
    none = runs["none"]
    for method, run in runs.items():
        for row in read_manifest(run):
            kind, character = row.prompt_id.partition("-")[0], row.category
            same = (run / row.path).read_bytes() == (none / row.path).read_bytes()
            if method == "none":
                assert row.references is None
            elif kind == "benign":
                assert row.references == {} and same, (method, row.path)
            elif kind == "direct":
                # Of the named asset, each with the cosine by which it was found.
                scores = list(row.references.values())
                assert {name.split("/")[0] for name in row.references} == {character}
                assert len(scores) == (1 if method.endswith("released") else 2)
                assert 1 > max(scores) > 0.6
                # A pipeline of random weights takes little notice of a text, and of pictures some.
                assert not same or method == "negative_prompt", (method, row.path)
    pushed = [run for method, run in runs.items() if "negtome" in method]
    logged = {run: [stats.get("tokens_pushed") for stats in Run(run).statistics()] for run in pushed}
    assert all(any(counts) and None in counts for counts in logged.values()), "attached only where something was found"


def test_every_configured_number_of_the_copyright_experiment_is_measured(protected):
    arguments, runs = protected
    (cfg,) = expand([*arguments, "method=none"])
    for method, (_, documents) in runs.items():
        found = {document["metric"]: document for document in documents.values()}
        assert set(found) == set(cfg.metric)
        assert (found["maximum_resemblance"]["n_groups"], found["clip_score_benign"]["n_groups"]) == (3, 2)
        assert found["identification"]["details"]["n_assets"] == 2
        assert found["detection_rate_direct"]["details"]["n_negative"] >= 19
        assert found["changed_share_benign"]["value"] == found["change_benign"]["value"] == 0, method
        assert found["changed_share_benign"]["encoder"]["id"] == "pixels"
        assert found["maximum_resemblance"]["encoder"]["id"] == "pixels-8x8"
        assert found["clip_score_unnamed"]["encoder"]["name"] == "mini-clip"


def test_the_copyright_table_and_figures(protected):
    arguments, runs = protected
    plan = plan_of(arguments)
    cfg = plan.cfg
    _, markdown = tabulate.write_table(plan)
    frame = pd.read_csv(f"{cfg.results}/copyright/table.csv", dtype=TEXT)
    assert list(frame.columns) == [column for column in COLUMNS if column in REQUIRED or column in frame]
    assert list(frame["run_id"].unique()) == [run.name for run, _ in runs.values()]
    assert set(frame["primary"].dropna()) == {"resemblance", "quality"}
    assert (frame["seconds"] > 0).all()
    assert (frame["difference"].notna() == (frame["method"] != "none")).all()
    references = frame[frame["method"] == "negtome_reference"]
    assert set(references["reference"]) == {"assets"} and (references["pushed_share"] > 0).all()
    table = main_table(frame)
    claims = [f"detection rate {kind}" for kind in ("direct", "indirect")]
    expected = [f"{claim}{column}" for claim in claims for column in (" (down)", ": p", ": d_z", ": win rate")]
    assert {*expected, "clip score unnamed (up)", "realism direct: non-inferior", "seconds"} <= set(table.columns)
    assert "34.57" in markdown and f"| {cfg.model.name} " in markdown
    files = {file.name: file for file in plot.plot(plan)}
    with Image.open(files["grid_sdxl.webp"]) as grid:
        assert grid.height > 2 * 32


def test_the_copyright_experiment_goes_on_where_it_stopped(protected, tmp_path):
    arguments, runs = protected
    run, _ = runs["negtome_and_negative_prompt"]
    arguments = [*arguments, "method=negtome_and_negative_prompt", f"outputs={tmp_path}"]
    folder = copied(run, tmp_path)
    for name in ("complete", "manifest.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "images" / "direct-a-photo-of-a-panda" / "000000")
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert generate(plan_of(arguments, "negtome_and_negative_prompt")) == [folder]
    assert pngs(folder) == pngs(run) and len(kept) == len(pngs(run)) - 2
    assert (folder / "manifest.jsonl").read_bytes() == (run / "manifest.jsonl").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_other_assets_make_another_run_and_moved_ones_do_not(protected, tmp_path):
    arguments, runs = protected
    here = expand([*arguments, "method=negtome_reference"])[0].model.copyright.guidance

    def request_of(folder):
        return request(expand([*arguments, "method=negtome_reference", f"model.copyright.guidance={folder}"])[0])

    shutil.copytree(here, tmp_path / "moved")
    stored = Run(runs["negtome_reference"][0]).identity["request"]
    assert request_of(tmp_path / "moved") == stored
    next(path for path in (tmp_path / "moved" / "ogre").iterdir() if ".mask" in path.name).unlink()
    assert request_of(tmp_path / "moved") != stored


def test_a_method_that_looks_for_assets_is_built_once_for_all_runs_of_a_model(protected, tmp_path, monkeypatch):
    """Whatever the runs differ in besides: it holds an encoder and the pictures' embeddings."""
    arguments, _ = protected
    built = []
    monkeypatch.setattr("experiments.generate.build", lambda spec: built.append(spec.get("name")) or build(spec))
    kinds, scales = "prompts.kinds=[indirect]", "model.call.guidance_scale=2,3,4"
    generate(plan_of([*arguments, kinds, scales, f"outputs={tmp_path}"], "negtome_reference"))
    assert built.count("negtome_reference") == 1


def test_without_assets_it_is_said_what_to_give(protected, tmp_path):
    arguments, _ = protected

    def configured(*changes):
        return plan_of([*arguments, "method=negtome_reference", f"outputs={tmp_path}", *changes], "negtome_reference")

    with pytest.raises(FileNotFoundError, match=r"^No protected assets .*model\.copyright\.guidance=FOLDER"):
        generate(configured("model.copyright.guidance=null"))
    with pytest.raises(FileNotFoundError, match=r"absent, which does not exist"):
        generate(configured(f"model.copyright.guidance={tmp_path / 'absent'}"))
    same = f"model.copyright.scoring={configured().cfg.model.copyright.guidance}"
    with pytest.raises(ValueError, match=r"^\d+ of the pictures that methods are given are also scored against"):
        generate(configured(same))
    # Without pictures to score, what compares with them is left out, and no table pretends to have the claim.
    unscored = configured("model.copyright.scoring=null")
    folder = configured("model.copyright.scoring=null", f"images={tmp_path}").cfg
    names = measured(folder)
    assert not any("resemblance" in name or "detection" in name for name in names) and "clip_score_unnamed" in names
    (line,) = [line for line in left_out_lines([folder]) if "maximum_resemblance," in line]
    assert "model.copyright.scoring=FOLDER" in line
    with pytest.raises(ValueError, match=r"primary\.resemblance .*'detection_rate_direct'"):
        tabulate.rows_of_runs(unscored)


def test_the_command_line_says_what_to_give_without_a_traceback(tmp_path, capsys):
    asked = ["model=mini-sdxl", "method=negtome_reference", "model.copyright.guidance=null", f"outputs={tmp_path}"]
    assert main(["generate", *asked]) == 2
    assert "No protected assets are configured" in capsys.readouterr().err
