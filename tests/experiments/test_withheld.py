"""Groups that end without images, from the method that refuses to the page: told of everywhere, compared nowhere."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf, open_dict
from PIL import Image
from plans import plan_from

from eval.files import read_document
from eval.images import read_manifest, read_withheld
from experiments import rank, tabulate
from experiments.check import compare_tables
from experiments.collect import collect, main
from experiments.compose import expand
from experiments.evaluate import evaluate, evaluate_folder
from experiments.figures.image_grid import image_grid
from experiments.figures.style import pixels
from experiments.generate import generate
from experiments.methods.method import GroupResult
from experiments.plan import Plan
from experiments.plot import plot
from experiments.report import report
from experiments.runs.store import Run
from experiments.tables.columns import OF_WITHHELD, merge_rows, read_table
from experiments.tables.pages import against_table, findings, main_table

#: Two categories with two groups each, which every method but the first withholds in part.
METHODS = {
    "none": None,
    "ours": {"*flower/000000": "refused"},
    "theirs": {"*fruit/000001": "blocked", "*flower/000001": "escalated"},
    "nothing": {"*": "refused"},
}


def configured(arguments, name):
    (cfg,) = expand([*arguments, "method=none"])
    with open_dict(cfg):
        if METHODS[name] is not None:
            cfg.method = OmegaConf.create(
                {"_target_": "stand_ins.Withholding", "name": name, "withhold": METHODS[name]}
            )
        metric = {"encoder": "${model.scorer}", "reference": str(arguments[-1].partition("=")[2]) + "/real"}
        cfg.metric.kernel_distance = {"_target_": "eval.fidelity.KernelDistance", **metric}
        cfg.metric.pooled = {"_target_": "eval.diversity.CategoryPooledSimilarity", "encoder": "${model.scorer}"}
        cfg.metric.fruit = {"_target_": "eval.diversity.PairwiseDistance", "encoder": "${model.scorer}"}
        cfg.metric.fruit["only"] = ["*fruit"]
    return cfg


def real_images(folder):
    for index in range(4):
        (folder / "real" / "flower").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (60 * index, 0, 90)).save(folder / "real" / "flower" / f"{index}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_overrides):
    """Scored runs of all methods, by name: overrides, plan, run folders."""
    folder = tmp_path_factory.mktemp("withheld")
    changes = ("method=none", "prompts.templates=[a photo of a]", "prompts.seeds=[0,1]", "model.groups_per_category=2",
               "prompts.groups_per_category=2", "report_seconds=true", f"outputs={folder}")  # fmt: skip
    real_images(folder)
    arguments = tiny_overrides("diversity", folder, *changes)
    arguments = [one for one in arguments if not one.startswith("outputs=")] + [changes[-1]]
    plan = plan_from(*(configured(arguments, name) for name in METHODS))
    folders = dict(zip(METHODS, generate(plan), strict=True))
    evaluate(plan)
    return arguments, plan, folders


def part(plan, *names):
    return Plan([spec for spec in plan.runs if spec.cfg.method.name in names])


@pytest.fixture
def copy(made, tmp_path):
    """A run that withholds a group, to be damaged: its plan and folder."""
    arguments, _, folders = made
    for name in ("runs", "diversity", "real"):
        shutil.copytree(folders["ours"].parents[1] / name, tmp_path / name)
    arguments = [*arguments[:-1], f"outputs={tmp_path}"]
    return plan_from(configured(arguments, "ours")), tmp_path / "runs" / folders["ours"].name


def test_a_run_names_the_groups_without_images_apart_from_its_images(made):
    _, _, folders = made
    none, ours, theirs, nothing = folders.values()
    assert [(row.group_id, str(row)) for row in read_withheld(ours)] == [
        ("a-photo-of-a-flower/000000", "refused: <flower> is protected (C1, C3)")
    ]
    assert [row.status for row in read_withheld(theirs)] == ["escalated", "blocked"]
    for folder, count in ((none, 8), (ours, 6), (theirs, 4), (nothing, 0)):
        paths = {folder / row.path for row in read_manifest(folder)}
        assert len(paths) == count and paths == set(folder.glob("images/**/*.png"))
    assert not (none / "withheld.jsonl").exists() and len((none / "complete").read_text()) == 64
    assert len(Run(ours).statistics()) == 3


def test_what_is_complete_is_not_made_again_and_the_log_counts(made, caplog, monkeypatch):
    monkeypatch.setattr("experiments.runs.checkpoints.load", lambda *a, **k: pytest.fail("loaded a pipeline"))
    caplog.set_level("INFO")
    _, plan, folders = made
    assert generate(part(plan, "theirs")) == [folders["theirs"]]
    assert "2 of 4 groups are withheld: 1 escalated, 1 blocked" in caplog.text
    assert "again" not in caplog.text


def test_a_run_without_any_image_is_said_in_a_line(made, caplog):
    _, plan, _ = made
    for file in evaluate(part(plan, "nothing")):
        assert read_document(file)["value"] is None
    assert "all 4 groups are withheld (4 refused): there are no images to measure" in caplog.text
    (cfg,) = expand([f"images={made[2]['nothing']}", "metric=tune", "scorer@model.scorer=pixel", "~metric.clip_score"])
    with pytest.raises(ValueError, match="withheld 4 refused"):
        evaluate_folder(cfg)


def of(frame, method, metric):
    (found,) = [row for _, row in frame.iterrows() if (row["method"], row["metric"]) == (method, metric)]
    return found


def test_a_table_pairs_what_both_show_and_counts_the_rest(made, caplog, tmp_path):
    _, plan, folders = made
    frame, page = tabulate.write_table(plan)
    row = of(frame, "ours", "pairwise_distance")
    assert (row["n_groups"], row["n_withheld"], row["n_paired"]) == (3, 1, 3)
    values = {}
    for name in ("none", "ours"):
        (file,) = (folders[name] / "metrics").glob("pairwise_distance-*")
        values[name] = {group["group"]: group["value"] for group in read_document(file)["groups"]}
    shared = values["none"].keys() & values["ours"].keys()
    assert len(shared) == 3
    # The images that are shown are the baseline's own.
    assert row["difference"] == pytest.approx(0, abs=1e-6)
    assert row["value"] == pytest.approx(np.mean([values["none"][group] for group in shared]), rel=1e-5)
    row = of(frame, "ours", "pooled")
    assert (row["n_groups"], row["n_paired"]) == (2, 1)  # the category that lacks a group is another pool
    row = of(frame, "ours", "kernel_distance")
    assert row["n_paired"] == 0 and pd.isna(row["difference"]) and not pd.isna(row["value"])
    assert "ours: there is no difference in kernel_distance: it is of a whole set" in caplog.text
    row = of(frame, "ours", "fruit")
    assert (row["n_withheld"], row["n_groups"]) == (0, 2) and pd.isna(row["n_paired"])  # of which none is withheld
    rows = frame[frame["method"] == "nothing"]
    assert rows["value"].isna().all() and (rows["n_groups"] == 0).all()
    assert set(rows["n_withheld"]) == {2, 4}
    table = main_table(frame).set_index("method")
    assert table["withheld"].to_dict() == {"none": 0, "ours": 1, "theirs": 2, "nothing": 4}
    assert table["paired"].to_dict() == {"none": "", "ours": 3, "theirs": 2, "nothing": 0}
    assert "withheld: groups" in page
    assert any("nothing: no images to measure" in text and "4 groups withheld" in text for text in findings(frame))
    assert any("ours: " in text and "(3 groups in 2 clusters; 1 withheld)" in text for text in findings(frame))


def test_two_methods_that_withhold_other_groups_are_paired_over_the_rest(made):
    _, plan, _ = made
    frame, _ = tabulate.write_comparison(part(plan, "none", "ours", "theirs"), "theirs")
    row = of(frame, "ours", "pairwise_distance")
    assert (row["n_groups"], row["n_withheld"], row["n_paired"]) == (3, 1, 1)
    table = against_table(frame, "theirs").set_index(["method", "metric"])
    # The other's own number is of other groups than the difference is.
    assert table.loc[("ours", "pairwise distance"), ["theirs", "groups"]].tolist() == ["", "1"]
    assert table.loc[("none", "pairwise distance"), "groups"] == "2"


def test_where_nothing_is_withheld_no_table_or_document_knows_of_it(made, tmp_path):
    _, plan, folders = made
    for file in (folders["none"] / "metrics").iterdir():
        assert "withheld" not in read_document(file)
    path = tmp_path / "t.csv"
    merge_rows(path, tabulate.rows_of_runs(part(plan, "none")))
    assert not set(OF_WITHHELD) & set(pd.read_csv(path).columns)
    assert "withheld" not in main_table(pd.read_csv(path))


def test_methods_are_ranked_over_the_same_groups_alone(made):
    _, plan, folders = made
    tabulate.write_table(plan)
    with pytest.raises(ValueError, match=f"{folders['ours'].name} of .*, which withheld 1 groups"):
        rank.read_paths(part(plan, "none", "ours").runs)


@pytest.mark.slow
def test_figures_and_report_show_a_plate_with_the_reason(made, tmp_path):
    _, plan, folders = made
    tabulate.write_table(plan)
    assert any("grid" in file.name for file in plot(plan))
    page = report(plan.results, folders["none"].parents[1], tmp_path / "page").read_text()
    plates = re.findall(r'<div class="withheld"><strong>(\w+)</strong>: ([^<]*)<span[^>]*>([^<]*)', page)
    assert len(plates) == 7
    assert ("escalated", "&lt;flower&gt; is protected ", "C1, C3") in plates
    assert "no images of this prompt" not in page


def test_a_text_stands_in_the_place_of_images():
    image = Image.new("RGB", (8, 8), "red")
    sheet = image_grid(["a", "b"], [("x", [[image, image], "refused: why " * 40]), ("y", [[image], [image]])])
    plain = image_grid(["a", "b"], [("x", [[image, image], [image]]), ("y", [[image], [image]])])
    sheet, plain = map(pixels, (sheet, plain))
    assert sheet.size == plain.size
    assert np.any(np.array(sheet) != np.array(plain))


def test_collect_and_check_count_them(made, tmp_path, capsys):
    _, plan, folders = made
    table, problems = collect(folders["none"].parents[1])
    assert problems.empty
    counts = table[table["metric"] == "pairwise_distance"].groupby("run_id")["n_withheld"].max()
    assert counts[folders["theirs"].name] == 2 and counts[folders["nothing"].name] == 4
    assert pd.isna(counts[folders["none"].name])
    main([str(folders["none"].parents[1]), "--to", str(tmp_path / "all")])
    assert "0 problems, 7 groups withheld" in capsys.readouterr().out
    tabulate.write_table(plan)
    path = plan.result_file()
    found = compare_tables(path, path).set_index("label")["made"]
    assert any("1 groups withheld" in text for label, text in found.items() if " ours" in label)
    assert any("no value, 4 groups withheld" in text for label, text in found.items() if " nothing" in label)
    assert len(read_table(plan.name, plan.results))


def flipped(folder):
    file = folder / "images" / "a-photo-of-a-flower" / "000000" / "group.json"
    file.write_text(file.read_text().replace("refused", "blocked"))
    return file


def other_group(folder):
    """A record that is whole, but another group's."""
    file = flipped(folder)
    shutil.copy(folder / "images" / "a-photo-of-a-flower" / "000001" / "group.json", file)
    return file


def gone(folder):
    file = flipped(folder)
    file.unlink()
    return file


@pytest.mark.parametrize("damage", [flipped, other_group, gone])
def test_a_damaged_record_is_named_and_its_group_is_made_again(damage, copy, caplog):
    plan, folder = copy
    withheld, file = (folder / "withheld.jsonl").read_bytes(), damage(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    generate(plan)
    assert "1 groups are made again" in caplog.text and str(file) in caplog.text
    assert (folder / "withheld.jsonl").read_bytes() == withheld
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and Run(folder).complete


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(2 * file.read_bytes())])
def test_an_edited_list_is_refused_and_restored(damage, copy):
    plan, folder = copy
    file = folder / "withheld.jsonl"
    before = file.read_bytes()
    damage(file)
    with pytest.raises(ValueError, match=f"got another {file}"):
        evaluate(plan)
    generate(plan)
    assert file.read_bytes() == before
    evaluate(plan)


def test_a_list_that_was_added_is_refused(made, copy):
    _, folder = copy
    none = folder.parent / made[2]["none"].name
    shutil.copy(folder / "withheld.jsonl", none)
    with pytest.raises(ValueError, match=f"got another {none / 'withheld.jsonl'}"):
        Run(none).check_manifest()


def test_a_method_returns_images_or_says_why_there_are_none():
    for images in (None, np.zeros((0, 8, 8, 3))):
        with pytest.raises(ValueError, match="expected images of a group, or why"):
            GroupResult(images, {})
