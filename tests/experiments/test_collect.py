"""One table of everything: every group and metric of every sound run, and a reason for all that is not in it."""

import json
import os
import shutil

import pandas as pd
import pytest

from eval.files import read_document, with_checksum
from experiments import collect as module
from experiments.collect import collect, write


@pytest.fixture
def runs(scored_sweep):
    """The outputs of two scored runs, and their folders. Not to be changed."""
    return scored_sweep[1:]


@pytest.fixture
def copy(scored_copy):
    """The same, to be changed."""
    return scored_copy[1:]


def reasons(outputs):
    table, problems = collect(outputs)
    return table, dict(zip(problems["path"], problems["problem"], strict=True))


def test_every_group_and_metric_has_a_row(runs):
    outputs, folders = runs
    table, problems = collect(outputs)
    assert problems.empty and list(problems.columns) == module.PROBLEMS
    documents = {file: read_document(file) for folder in folders for file in sorted((folder / "metrics").iterdir())}
    assert len(table) == sum(len(document["groups"]) for document in documents.values()) == 2 * 3 * 2
    for file, document in documents.items():
        mine = table[(table["run_id"] == file.parents[1].name) & (table["metric"] == document["metric"])]
        values = {group["group"]: group["value"] for group in document["groups"]}
        assert dict(zip(mine["group"], mine["value"], strict=True)) == values
    assert set(table["experiment"]) == {"sweep"} and set(table["split"]) == {"development"}
    assert set(table["category"]) == {"flower", "fruit"} and (table["n_images"] == 2).all()
    assert (table["group"] == table["prompt_id"] + "/" + table["seed"].map("{:06d}".format)).all()
    pushed = table["method"] == "negtome"
    assert (table.loc[pushed, "method.alpha"] == 0.9).all() and table.loc[~pushed, "method.alpha"].isna().all()
    assert (table.loc[pushed, "method.t_low"] == 0).all() and (table["call.num_inference_steps"] == 2).all()
    assert table[["device", "commit", "weights", "encoder", "unit"]].notna().all(axis=None)


def test_files_are_the_same_every_time(runs, tmp_path):
    table, problems = collect(runs[0])
    files = write(table, problems, tmp_path / "all")
    read = pd.read_csv(tmp_path / "all.csv", dtype={"run_id": str})
    assert read["value"].tolist() == table["value"].tolist() and list(read.columns) == list(table.columns)
    before = {file: file.read_bytes() for file in files}
    write(*collect(runs[0]), tmp_path / "all")
    assert {file: file.read_bytes() for file in files} == before
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}


def test_parquet_keeps_the_types_and_needs_pyarrow(runs, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    table, problems = collect(runs[0])
    write(table, problems, tmp_path / "all")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "all.parquet"), table)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert [file.name for file in write(table, problems, tmp_path / "csv")] == ["csv.csv", "csv_problems.csv"]


def test_damaged_runs_are_listed_with_the_reason_and_keep_no_other_run_out(copy):
    outputs, (none, _) = copy

    def another(name):
        return shutil.copytree(none, none.with_name(name))

    half = shutil.copytree(none, outputs / "other" / none.name)
    (half / "complete").unlink()
    shutil.rmtree(next(half.glob("images/*/[0-9]*")))
    another("111111111111")  # its settings have another hash
    (another("222222222222") / "config.yaml").write_text("{")
    (another("333333333333") / "config.yaml").unlink()
    (outputs / "foreign").mkdir()
    (outputs / "foreign" / "config.yaml").write_text("model: something else\n")
    (outputs / "mini" / "data").mkdir(parents=True)  # not meant to be a run
    (outputs / "mini" / "data" / "weights.bin").write_text("")
    table, problems = reasons(outputs)
    assert len(table) == 12
    expected = {
        half.relative_to(outputs).as_posix(): "half-finished: 1 of 2 groups",
        "runs/111111111111": "does not hash to its folder's name", "runs/222222222222": "cannot be read",
        "runs/333333333333": "without config.yaml", "foreign": "cannot be read",
    }  # fmt: skip
    assert set(problems) == set(expected)
    for path, text in expected.items():
        assert text in problems[path], path


def test_scores_that_do_not_belong_to_the_images_are_stale(copy):
    outputs, (none, pushed) = copy
    one, two, three = sorted((none / "metrics").iterdir())
    one.write_text(one.read_text()[:40])
    document = json.loads(two.read_text())
    two.write_text(json.dumps(with_checksum(document | {"version": document["version"] - 1})))
    three.write_text(json.dumps(with_checksum({"metric": "mine", "groups": []})))
    for file in (pushed / "metrics").iterdir():
        file.write_text(json.dumps(with_checksum(read_document(file) | {"manifest_sha256": "of other images"})))
    table, problems = reasons(outputs)
    assert table.empty and len(problems) == 6
    texts = [problems.pop(file.relative_to(outputs).as_posix()) for file in (one, two, three)]
    assert texts[0].startswith("expected JSON in")
    assert texts[1].startswith(f"of another version: expected {document['version']}, got {document['version'] - 1}")
    assert texts[2].startswith("damaged or foreign: KeyError")
    assert all(text.startswith("stale: the images are others") for text in problems.values())


def test_missing_images_scores_and_older_generators_are_told_apart(copy, monkeypatch):
    outputs, (none, pushed) = copy
    next(none.glob("images/*/*/00.png")).unlink()
    shutil.rmtree(pushed / "metrics")
    problems = reasons(outputs)[1]
    texts = [problems[folder.relative_to(outputs).as_posix()] for folder in (none, pushed)]
    assert "got no file" in texts[0] and texts[1].startswith("not scored")
    monkeypatch.setattr(module, "GENERATION_VERSION", module.GENERATION_VERSION + 1)
    table, problems = reasons(outputs)
    assert table.empty and len(problems) == 2
    assert all(text.startswith("of another version") for text in problems.values())


#: A YAML of 400 bytes that stands for a configuration of 10**9 nodes.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def _pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _zeros(file):
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def _huge(file):
    with file.open("r+b") as opened:
        opened.truncate(1 << 40)  # takes no space on the disk


WAYS = {
    "nested": lambda file: file.write_text('{"metric": ' + "[" * 100_000),
    "nested and complete": lambda file: file.write_text('{"metric": 1, "groups": ' + "[" * 90 + "]" * 90 + "}"),
    "bomb": lambda file: file.write_text(BOMB),
    "pipe": _pipe,
    "zeros": _zeros,
    "huge": _huge,
    "number": lambda file: file.write_text("1"),
    "infinite": lambda file: file.write_text('{"metric": NaN, "groups": Infinity}'),
}


NAMES = ["config.yaml", "environment.json", "manifest.jsonl", "metrics/*.json"]
#: By default every second pair of a way and a file: each way damages two files, and each file is damaged in four ways.
DAMAGES = [
    pytest.param(way, name, marks=[pytest.mark.slow] * ((row + column) % 2))
    for row, way in enumerate(WAYS)
    for column, name in enumerate(NAMES)
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize(("way", "name"), DAMAGES)
def test_a_hostile_file_of_any_kind_is_named_and_keeps_no_other_run_out(way, name, copy):
    outputs, (_, pushed) = copy
    (file, *_) = sorted(pushed.glob(name))
    WAYS[way](file)
    table, problems = reasons(outputs)
    is_score = name.startswith("metrics")
    assert len(table) == (10 if is_score else 6)
    assert list(problems) == [(file if is_score else pushed).relative_to(outputs).as_posix()]
    assert file.name in next(iter(problems.values()))


def test_folders_that_are_links_are_listed(copy, tmp_path):
    outputs, (none, pushed) = copy
    shutil.move(pushed, tmp_path / pushed.name)
    pushed.symlink_to(tmp_path / pushed.name)
    (outputs / "other").symlink_to(tmp_path)
    table, problems = reasons(outputs)
    assert set(table["run_id"]) == {none.name}
    assert set(problems) == {pushed.relative_to(outputs).as_posix(), "other"}
    assert all(text.startswith("a link, which is not followed") for text in problems.values())
    assert len(collect(pushed)[0]) == 6, "a link that is named itself"


def test_a_value_of_all_images_has_no_group(copy):
    outputs, (none, _) = copy
    file = next((none / "metrics").glob("vendi_score*"))
    document = json.loads(file.read_text()) | {"metric": "set_metric", "groups": [], "value": 3.5}
    file.write_text(json.dumps(with_checksum(document)))
    table, problems = collect(outputs)
    (row,) = table[table["metric"] == "set_metric"].to_dict("records")
    assert (row["value"], row["n_images"]) == (3.5, 4)
    assert all(pd.isna(row[name]) for name in ("group", "prompt", "category", "seed"))
    assert problems.empty


def test_a_run_folder_itself_is_collected(copy):
    outputs, (none, _) = copy
    table, _ = collect(outputs)
    table_of_run, problems = collect(none)
    assert problems.empty and len(table_of_run) == 6
    assert table_of_run["value"].tolist() == table.loc[table["run_id"] == none.name, "value"].tolist()
    (none / "complete").unlink()
    table, problems = reasons(none)
    assert table.empty and list(problems) == ["."] and problems["."].startswith("half-finished: 2 of 2 groups")


def test_a_folder_that_is_not_there_and_one_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent, which does not exist"):
        collect(tmp_path / "absent")
    table, problems = collect(tmp_path)
    assert table.empty and problems.empty
    assert len(write(table, problems, tmp_path / "empty")) >= 2
