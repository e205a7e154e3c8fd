"""Images, records, scores and embeddings that are not as they were written: each is named, and none is counted."""

import json
import shutil

import pytest
from PIL import Image

from eval.files import read_document, with_checksum
from eval.images import read_manifest
from experiments import tabulate
from experiments.collect import collect
from experiments.compose import expand
from experiments.evaluate import evaluate, evaluate_folder
from experiments.generate import generate


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def other_image(none, image):
    shutil.copy(none / image.relative_to(image.parents[3]), image)


def other_group(none, image):
    """With its record, which is then the other run's."""
    shutil.rmtree(image.parent)
    shutil.copytree((none / image.relative_to(image.parents[3])).parent, image.parent)


def empty(none, image):
    image.write_bytes(b"")


def flipped(none, image):
    flip(image, len(image.read_bytes()) // 2)


def slow(damage):
    return pytest.param(damage, marks=pytest.mark.slow)


@pytest.mark.parametrize("damage", [slow(other_image), other_group, slow(empty), flipped])
def test_an_image_that_was_not_generated_is_named_and_only_its_group_is_made_again(damage, scored_copy, caplog):
    plan, outputs, (none, pushed) = scored_copy
    before = files(pushed)
    image = pushed / read_manifest(pushed)[1].path
    damage(none, image)
    with pytest.raises(ValueError, match=f"got another file at {image}.*generate again"):
        evaluate(plan)
    with pytest.raises(ValueError, match=str(image)):
        tabulate.rows_of_runs(plan)
    table, problems = collect(outputs)
    assert set(table["run_id"]) == {none.name}
    assert problems["path"].tolist() == [pushed.relative_to(outputs).as_posix()]
    assert str(image) in problems["problem"][0]
    kept = {path: path.stat().st_mtime_ns for path in pushed.rglob("*.png") if path.parent != image.parent}
    generate(plan)
    assert "1 groups are made again" in caplog.text and str(image.parent) in caplog.text
    assert files(pushed) == before and {path: path.stat().st_mtime_ns for path in kept} == kept
    evaluate(plan)
    assert collect(outputs)[1].empty


def test_a_run_of_a_version_that_recorded_no_hashes_is_made_again(scored_copy, caplog):
    plan, _, (none, _) = scored_copy
    before = files(none)
    for path in none.glob("images/*/*/group.json"):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            del row["sha256"]
        path.write_text(json.dumps({"rows": record["rows"], "stats": record["stats"]}))
    (none / "complete").write_text("")
    with pytest.raises(ValueError, match="of an earlier version; run experiments"):
        evaluate(plan)
    generate(plan)
    assert "2 groups are made again" in caplog.text and files(none) == before
    evaluate(plan)


def test_edited_manifests_scores_and_counts_are_never_counted(scored_copy, caplog):
    plan, outputs, (none, pushed) = scored_copy
    manifest = none / "manifest.jsonl"
    before = manifest.read_text()
    manifest.write_text(before.replace(" flower", " gun"))
    with pytest.raises(ValueError, match=f"got another {manifest}"):
        evaluate(plan)
    assert str(manifest) in collect(outputs)[1]["problem"][0]
    generate(plan)
    assert manifest.read_text() == before

    score = next((none / "metrics").glob("pairwise_distance*"))
    document = read_document(score)
    groups = [group | {"value": 0.123456} for group in document["groups"]]
    score.write_text(json.dumps(document | {"groups": groups, "value": 0.123456}))
    with pytest.raises(ValueError, match=f"{score}, got other values"):
        tabulate.rows_of_runs(plan)
    table, problems = collect(outputs)
    assert 0.123456 not in set(table["value"]) and str(score) in problems["problem"][0]
    evaluate(plan)
    assert str(score) in caplog.text and read_document(score)["value"] == document["value"]

    record = next(pushed.glob("images/*/*/group.json"))
    record.write_text(record.read_text().replace('"tokens_pushed": ', '"tokens_pushed": 1'))
    with pytest.raises(ValueError, match=f"{record}, got other values"):
        tabulate.rows_of_runs(plan)


@pytest.mark.parametrize("value", ["NaN", '"\\ud800"'])
def test_a_file_that_is_no_document_is_named_too(value, tmp_path):
    file = tmp_path / "score.json"
    file.write_text(f'{{"metric": "a", "groups": [], "value": {value}, "sha256": "0"}}')
    with pytest.raises(ValueError, match=f"{file}, got other values"):
        read_document(file)


def test_a_flipped_bit_in_the_embedding_cache_changes_no_number(scored_copy, caplog):
    plan, outputs, (none, _) = scored_copy
    shards = list((outputs / ".embeddings").rglob("*.safetensors"))
    for shard in shards:
        flip(shard, len(shard.read_bytes()) - 3)
    before = {file: read_document(file) for file in (none / "metrics").iterdir()}
    shutil.rmtree(none / "metrics")
    evaluate(plan)
    assert {file: read_document(file) for file in before} == before
    assert any(str(shard) in caplog.text for shard in shards)


def test_a_score_that_came_with_the_images_is_not_used(tmp_path):
    folder = tmp_path / "received"
    (folder / "bird").mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (8, 8), (0, 99 * index, 0)).save(folder / "bird" / f"{index}.png")
    changes = ["metric=tune", "scorer@model.scorer=pixel", "~metric.clip_score", f"outputs={tmp_path / 'outputs'}"]
    (cfg,) = expand([f"images={folder}", *changes])
    table, _ = evaluate_folder(cfg)
    (file,) = (folder / "metrics").iterdir()
    document = read_document(file)
    forged = document | {"value": 0.99, "groups": [document["groups"][0] | {"value": 0.99}]}
    file.write_text(json.dumps(with_checksum(forged)))
    assert evaluate_folder(cfg)[0].equals(table) and read_document(file) == document
