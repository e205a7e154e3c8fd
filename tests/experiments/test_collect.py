"""One table of everything: every group and metric of every sound run, and a reason for all that is not in it."""

import json
import os
import shutil

import pandas as pd
import pytest
from plans import plan_of

from eval.files import read_document, with_checksum
from experiments import collect as module
from experiments.collect import collect, write
from experiments.evaluate import evaluate
from experiments.generate import generate


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_overrides):
    """Two scored runs of one experiment, with a metric of groups and an entropy: their outputs, and the folders."""
    folder = tmp_path_factory.mktemp("collect")
    plan = plan_of(tiny_overrides("sweep", folder, "method=none,negtome"))
    folders = generate(plan)
    evaluate(plan)
    return folder / "outputs", folders


@pytest.fixture
def copy(runs, tmp_path):
    """The same, to be changed: outputs and the two run folders."""
    outputs, folders = runs
    shutil.copytree(outputs, tmp_path / "outputs")
    return tmp_path / "outputs", [tmp_path / "outputs" / folder.relative_to(outputs) for folder in folders]


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


def test_the_files_say_the_same_and_are_the_same_every_time(runs, tmp_path):
    table, problems = collect(runs[0])
    files = write(table, problems, tmp_path / "all")
    read = pd.read_csv(tmp_path / "all.csv", dtype={"run_id": str})
    assert read["value"].tolist() == table["value"].tolist() and list(read.columns) == list(table.columns)
    before = {file: file.read_bytes() for file in files}
    write(*collect(runs[0]), tmp_path / "all")
    assert {file: file.read_bytes() for file in files} == before
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}


def test_parquet_keeps_the_types(runs, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    table, problems = collect(runs[0])
    write(table, problems, tmp_path / "all")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "all.parquet"), table)


def test_without_pyarrow_there_is_a_csv(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert [file.name for file in write(*collect(runs[0]), tmp_path / "all")] == ["all.csv", "all_problems.csv"]


def test_what_cannot_be_taken_is_listed_with_the_reason_and_keeps_nothing_else_out(copy):
    outputs, (none, _) = copy
    whole = len(collect(outputs)[0])

    # Beside two sound runs, everything that can be wrong with one.
    def another(name):
        return shutil.copytree(none, none.with_name(name))

    half = shutil.copytree(none, outputs / "other" / none.name)
    (half / "complete").unlink()
    shutil.rmtree(next(half.glob("images/*/[0-9]*")))
    another("111111111111")  # not what its settings hash to
    (another("222222222222") / "config.yaml").write_text("{")
    (another("333333333333") / "config.yaml").unlink()
    (outputs / "foreign").mkdir()
    (outputs / "foreign" / "config.yaml").write_text("model: something else\n")
    (outputs / "mini" / "data").mkdir(parents=True)  # no run, and not meant to be one
    (outputs / "mini" / "data" / "weights.bin").write_text("")
    table, problems = reasons(outputs)
    assert len(table) == whole
    places = {path.rpartition("/")[2] if path.startswith("runs") else path: text for path, text in problems.items()}
    assert "half-finished: 1 of 2 groups" in places.pop(half.relative_to(outputs).as_posix())
    assert "does not hash to its folder's name" in places.pop("111111111111")
    assert "cannot be read" in places.pop("222222222222")
    assert "without config.yaml" in places.pop("333333333333")
    assert "cannot be read" in places.pop("foreign")
    assert not places


def test_scores_that_do_not_belong_to_the_images_are_stale(copy):
    outputs, (none, pushed) = copy
    whole = len(collect(outputs)[0])
    one, two, three = sorted((none / "metrics").iterdir())
    one.write_text(one.read_text()[:40])
    document = json.loads(two.read_text())
    two.write_text(json.dumps(with_checksum(document | {"version": document["version"] - 1})))
    three.write_text(json.dumps(with_checksum({"metric": "mine", "groups": []})))
    for file in (pushed / "metrics").iterdir():
        file.write_text(json.dumps(with_checksum(read_document(file) | {"manifest_sha256": "of other images"})))
    table, problems = reasons(outputs)
    assert len(table) == 0 and whole == 12
    assert len(problems) == 6
    texts = [problems[file.relative_to(outputs).as_posix()] for file in (one, two, three)]
    assert texts[0].startswith("expected JSON in")
    assert texts[1].startswith(f"of another version: expected {document['version']}, got {document['version'] - 1}")
    assert texts[2].startswith("damaged or foreign: KeyError")
    stale = [text for path, text in problems.items() if pushed.name in path]
    assert len(stale) == 3 and all(text.startswith("stale: the images are others") for text in stale)


def test_missing_images_scores_and_older_generators_are_told_apart(copy):
    outputs, (none, pushed) = copy
    next(none.glob("images/*/*/00.png")).unlink()
    shutil.rmtree(pushed / "metrics")
    _, problems = reasons(outputs)
    found = {path.rpartition("/")[2]: text for path, text in problems.items()}
    assert "got no file" in found[none.name] and found[pushed.name].startswith("not scored")


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
        opened.truncate(1 << 40)  # no byte of it on the disk


WAYS = {
    "nested": lambda file: file.write_text('{"metric": ' + "[" * 100_000),
    "nested and whole": lambda file: file.write_text('{"metric": 1, "groups": ' + "[" * 90 + "]" * 90 + "}"),
    "bomb": lambda file: file.write_text(BOMB),
    "pipe": _pipe,
    "zeros": _zeros,
    "huge": _huge,
    "number": lambda file: file.write_text("1"),
    "infinite": lambda file: file.write_text('{"metric": NaN, "groups": Infinity}'),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "manifest.jsonl", "metrics/*.json"])
@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_run_of_any_kind_is_listed_and_keeps_nothing_else_out(way, name, copy):
    outputs, (_, pushed) = copy
    (file, *_) = sorted(pushed.glob(name))
    WAYS[way](file)
    table, problems = reasons(outputs)
    whole = name.startswith("metrics")
    assert len(table) == (10 if whole else 6)
    assert list(problems) == [(file if whole else pushed).relative_to(outputs).as_posix()]
    assert file.name in next(iter(problems.values())), "named"


def test_folders_that_are_links_are_said(copy, tmp_path):
    outputs, (none, pushed) = copy
    shutil.move(pushed, tmp_path / pushed.name)
    pushed.symlink_to(tmp_path / pushed.name)
    (outputs / "other").symlink_to(tmp_path)
    table, problems = reasons(outputs)
    assert set(table["run_id"]) == {none.name}
    assert set(problems) == {pushed.relative_to(outputs).as_posix(), "other"}
    assert all(text.startswith("a link, which is not followed") for text in problems.values())
    assert len(collect(pushed)[0]) == 6, "a link that is asked for itself"


def test_images_of_an_earlier_generator_are_of_another_version(copy, monkeypatch):
    outputs, _ = copy
    monkeypatch.setattr(module, "GENERATION_VERSION", module.GENERATION_VERSION + 1)
    table, problems = reasons(outputs)
    assert table.empty and all(text.startswith("of another version") for text in problems.values())
    assert len(problems) == 2


def test_a_number_of_the_whole_set_has_no_group(copy):
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
    own, problems = collect(none)
    assert problems.empty and len(own) == 6
    assert own["value"].tolist() == table.loc[table["run_id"] == none.name, "value"].tolist()
    (none / "complete").unlink()
    table, problems = reasons(none)
    assert table.empty and list(problems) == ["."] and problems["."].startswith("half-finished: 2 of 2 groups")


def test_a_folder_that_is_not_there_and_one_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent, which does not exist"):
        collect(tmp_path / "absent")
    table, problems = collect(tmp_path)
    assert table.empty and problems.empty
    assert len(write(table, problems, tmp_path / "empty")) >= 2


def test_every_configured_metric_is_known_by_its_version():
    versions = module.metric_versions()
    assert {"pairwise_distance", "clip_score", "frechet_distance_40_efflite0", "maximum_resemblance"} <= set(versions)
    assert all(isinstance(version, int) for found in versions.values() for version in found)
