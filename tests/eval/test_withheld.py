"""Groups that ended without images: told of, never measured, and never a hidden difference between two sets."""

import json

import numpy as np
import pytest
from PIL import Image

from eval.attributes import AttributeEntropy
from eval.diversity import CategoryPooledSimilarity, PairwiseDistance
from eval.encoders import PixelEncoder
from eval.fidelity import KernelDistance
from eval.files import read_document
from eval.images import (
    Withheld,
    WithheldRow,
    count_withheld,
    read_manifest,
    read_withheld,
    write_manifest,
    write_withheld,
)
from eval.imageset import ImageSet
from eval.intervals import MINIMUM_IMAGES, difference_of, interval_of, n_shared, n_units, shared_groups
from eval.metric import is_current, measure
from eval.resemblance import MaximumResemblance

ENCODER = PixelEncoder()


def withhold(folder, *groups, status="refused"):
    """Take groups of a run away, and say why."""
    rows = [row for row in read_manifest(folder) if row.group_id in groups and row.index == 0]
    told = [
        WithheldRow(status, "it is protected", ("C1",), prompt_id=row.prompt_id, prompt=row.prompt,
                    category=row.category, group_seed=row.group_seed)
        for row in rows
    ]  # fmt: skip
    write_manifest(folder, [row for row in read_manifest(folder) if row.group_id not in groups])
    write_withheld(folder, [*read_withheld(folder), *told])
    return folder


@pytest.mark.parametrize(
    "arguments", [("hidden", "why"), ("refused", ""), ("refused", "a\nb"), ("refused", 3), ("refused", "why", "C1")]
)
def test_what_is_no_reason_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Withheld(*arguments)


def test_what_is_written_is_read_and_without_any_there_is_no_file(make_run):
    folder = withhold(make_run(), "fish/000001", "bird/000000")
    rows = read_withheld(folder)
    assert [row.group_id for row in rows] == ["bird/000000", "fish/000001"]
    assert rows[0].clauses == ("C1",) and str(rows[0]) == "refused: it is protected (C1)"
    assert count_withheld([*rows, Withheld("blocked", "too alike")]) == "2 refused, 1 blocked"
    write_withheld(folder, [])
    assert read_withheld(folder) == [] and not (folder / "withheld.jsonl").exists()


@pytest.mark.parametrize(
    "change", [lambda text: text * 2, lambda text: text[:-9], lambda text: text.replace("ref", "")]
)
def test_a_damaged_file_is_named(change, make_run):
    folder = withhold(make_run(), "bird/000000")
    file = folder / "withheld.jsonl"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=str(file)):
        ImageSet.open(folder)


def test_a_group_is_shown_or_withheld(make_run):
    folder = make_run()
    rows = read_manifest(folder)
    withhold(folder, "bird/000000")
    write_manifest(folder, rows)
    with pytest.raises(ValueError, match="got both of bird/000000"):
        ImageSet.open(folder)


def test_a_document_says_which_groups_are_withheld_and_is_of_those_alone(make_run):
    folder, metric = make_run(), PairwiseDistance(ENCODER)
    whole = measure(metric, folder)
    assert "withheld" not in whole
    withhold(folder, "bird/000001")
    assert not is_current(whole, metric, folder)
    found = measure(metric, folder)
    assert found["withheld"] == [{"group": "bird/000001", "category": "bird", "status": "refused"}]
    assert found["groups"] == [group for group in whole["groups"] if group["group"] != "bird/000001"]
    assert is_current(read_document(folder / "metrics" / "pairwise_distance.json"), metric, folder)
    file = folder / "withheld.jsonl"
    file.write_text(file.read_text().replace('"refused"', '"escalated"'))
    assert not is_current(found, metric, folder)


def test_pairs_are_of_the_groups_that_both_show(make_run):
    metric, whole = PairwiseDistance(ENCODER), make_run("whole")
    ours, theirs = make_run("ours", offset=100), make_run("theirs", offset=200)
    full = [measure(metric, folder) for folder in (ours, theirs, whole)]
    withhold(ours, "bird/000001")
    withhold(theirs, "fish/000000", status="blocked")
    documents = [measure(metric, folder) for folder in (ours, theirs)]
    values = [{group["group"]: group["value"] for group in document["groups"]} for document in full]
    shared = ["bird/000000", "fish/000001"]
    expected = np.mean([values[0][group] - values[1][group] for group in shared])
    assert difference_of(*documents).difference == pytest.approx(expected)
    assert difference_of(*documents).n == n_shared(*documents) == 2
    assert difference_of(documents[0], full[2]).n == 3
    # Where nothing is withheld, groups that one side lacks are a mistake, as ever.
    short = full[2] | {"groups": full[2]["groups"][1:]}
    with pytest.raises(ValueError, match="only in the first"):
        difference_of(full[0], short)


def test_a_pool_that_lacks_a_group_on_one_side_alone_is_no_pair(make_run):
    """Equal counts, too, may be of different groups."""
    metric, ours, theirs = CategoryPooledSimilarity(ENCODER), make_run("ours"), make_run("theirs", offset=100)
    withhold(ours, "bird/000000", "fish/000000")
    withhold(theirs, "bird/000001", "fish/000000")
    a, b = shared_groups(*[measure(metric, folder) for folder in (ours, theirs)])
    assert [group["group"] for group in a] == [group["group"] for group in b] == ["fish/all"]


def test_entropies_are_of_what_both_show_where_it_is_enough():
    def document(*groups, withheld=()):
        counted = [{"group": name, "category": name[0], "n_images": MINIMUM_IMAGES, "counts": {"x": 5, "y": 3}}
                   for name in groups]  # fmt: skip
        told = [{"group": name, "category": name[0], "status": "blocked"} for name in withheld]
        return {"aggregate": "category_entropy", "value": 1.0, "groups": counted, "withheld": told}

    a = document("a/0", "a/1", "b/0", withheld=["b/1"])
    b = document("a/0", "b/0", "b/1", withheld=["a/1"])
    assert [group["group"] for group in shared_groups(a, b)[1]] == ["a/0", "b/0"]
    for one in (a, b):
        for group in one["groups"]:
            group["n_images"] -= group["category"] == "b"
    assert [group["group"] for group in shared_groups(a, b)[1]] == ["a/0"]
    none = document("c/0", withheld=["a/0"])
    assert n_shared(a, none) == 0


def test_numbers_of_whole_sets_are_subtracted_where_the_sets_are_the_same(make_run):
    real = make_run("real", offset=300)
    ours, theirs, whole = make_run("ours"), make_run("theirs", offset=100), make_run("whole", offset=200)
    for folder in (ours, theirs):
        withhold(folder, "bird/000000")
    ours, theirs, whole = (measure(KernelDistance(ENCODER, real), folder) for folder in (ours, theirs, whole))
    assert n_shared(ours, theirs) == 3 and difference_of(ours, theirs).difference == ours["value"] - theirs["value"]
    assert n_shared(ours, whole) == 0
    with pytest.raises(ValueError, match="of the same groups"):
        difference_of(ours, whole)


def test_of_what_is_all_withheld_there_is_no_number_but_a_document(make_run):
    folder = withhold(make_run(), "bird/000000", "bird/000001", "fish/000000", "fish/000001")
    real = make_run("real", offset=300)
    for metric in (PairwiseDistance(ENCODER), KernelDistance(ENCODER, real), AttributeEntropy(ENCODER, ["a", "b"])):
        document = measure(metric, folder)
        assert document["value"] is None and document["n_images"] == 0 and len(document["withheld"]) == 4
        assert np.isnan(interval_of(document).value) and interval_of(document).low is None and n_units(document) == 0
        assert is_current(document, metric, folder)


def test_a_metric_of_some_prompts_tells_of_those_alone(make_run, tmp_path):
    folder = withhold(make_run(), "bird/000000", "bird/000001", "fish/000000")
    metric = PairwiseDistance(ENCODER)
    metric.only = ("bird*",)
    document = measure(metric, folder)
    assert document["value"] is None and {group["category"] for group in document["withheld"]} == {"bird"}
    metric.only = ("cat*",)
    with pytest.raises(ValueError, match="expected prompts named cat"):
        measure(metric, folder)
    (tmp_path / "assets" / "bird").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "assets" / "bird" / "0.png")
    document = measure(MaximumResemblance(ENCODER, tmp_path / "assets"), folder)
    assert document["value"] is None and len(document["withheld"]) == 2
    json.dumps(document, allow_nan=False)


def test_too_few_images_are_no_number_where_the_rest_is_withheld(make_run):
    real = make_run("real", offset=300)
    short = make_run("short", categories=("bird",), seeds=(0,), images=1)
    with pytest.raises(ValueError, match="expected at least 2 images"):
        measure(KernelDistance(ENCODER, real), short)
    folder = withhold(make_run(images=1), "bird/000000", "bird/000001", "fish/000000")
    document = measure(KernelDistance(ENCODER, real), folder)
    assert document["value"] is None and document["n_images"] == 1
