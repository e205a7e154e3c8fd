"""Groups that ended without images: listed, never measured, and counted by the metrics of requests."""

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
from eval.requests import NotOverrefuse, NotUnsafe
from eval.resemblance import DetectionRate

ENCODER = PixelEncoder()
ALL = ["bird/000000", "bird/000001", "fish/000000", "fish/000001"]


def withhold(folder, *groups, status="refused"):
    """Move groups of a run from its manifest to its withheld groups."""
    rows = [row for row in read_manifest(folder) if row.group_id in groups and row.index == 0]
    withheld = [
        WithheldRow(status, "it is protected", ("C1",), prompt_id=row.prompt_id, prompt=row.prompt,
                    category=row.category, group_seed=row.group_seed)
        for row in rows
    ]  # fmt: skip
    write_manifest(folder, [row for row in read_manifest(folder) if row.group_id not in groups])
    write_withheld(folder, [*read_withheld(folder), *withheld])
    return folder


def values(document):
    return {group["group"]: group["value"] for group in document["groups"]}


def test_rows_are_read_as_written_and_an_empty_file_is_removed(make_run):
    folder = withhold(make_run(), "fish/000001", "bird/000000")
    rows = read_withheld(folder)
    assert [row.group_id for row in rows] == ["bird/000000", "fish/000001"]
    assert rows[0].clauses == ("C1",) and str(rows[0]) == "refused: it is protected (C1)"
    assert count_withheld([*rows, Withheld("blocked", "too alike")]) == "2 refused, 1 blocked"
    write_withheld(folder, [])
    assert read_withheld(folder) == [] and not (folder / "withheld.jsonl").exists()
    for arguments in (("hidden", "why"), ("refused", ""), ("refused", "a\nb"), ("refused", "why", "C1")):
        with pytest.raises(ValueError, match="expected"):
            Withheld(*arguments)


@pytest.mark.parametrize(
    "change", [lambda text: text * 2, lambda text: text[:-9], lambda text: text.replace("ref", "")]
)
def test_a_damaged_or_contradictory_file_is_named(change, make_run):
    folder = make_run()
    rows = read_manifest(folder)
    file = withhold(folder, "bird/000000") / "withheld.jsonl"
    content = file.read_text()
    file.write_text(change(content))
    with pytest.raises(ValueError, match=str(file)):
        ImageSet.open(folder)
    file.write_text(content)
    write_manifest(folder, rows)
    with pytest.raises(ValueError, match="got both of bird/000000"):
        ImageSet.open(folder)


def test_a_document_lists_the_withheld_groups_of_its_prompts(make_run):
    folder, metric = make_run(), PairwiseDistance(ENCODER)
    complete = measure(metric, folder)
    assert "withheld" not in complete
    withhold(folder, "bird/000001")
    assert not is_current(complete, metric, folder)
    document = measure(metric, folder)
    assert document["withheld"] == [{"group": "bird/000001", "category": "bird", "status": "refused"}]
    assert document["groups"] == [group for group in complete["groups"] if group["group"] != "bird/000001"]
    assert is_current(read_document(folder / "metrics" / "pairwise_distance.json"), metric, folder)
    file = folder / "withheld.jsonl"
    file.write_text(file.read_text().replace('"refused"', '"escalated"'))
    assert not is_current(document, metric, folder)
    withhold(folder, "bird/000000", "fish/000000")
    metric.only = ("bird*",)
    document = measure(metric, folder)
    assert document["value"] is None and {group["category"] for group in document["withheld"]} == {"bird"}
    metric.only = ("cat*",)
    with pytest.raises(ValueError, match="expected prompts named cat"):
        measure(metric, folder)


def test_pairs_are_of_the_groups_that_both_have(make_run):
    metric, other = PairwiseDistance(ENCODER), make_run("other")
    ours, theirs = make_run("ours", offset=100), make_run("theirs", offset=200)
    complete = [measure(metric, folder) for folder in (ours, theirs, other)]
    withhold(ours, "bird/000001")
    withhold(theirs, "fish/000000", status="blocked")
    documents = [measure(metric, folder) for folder in (ours, theirs)]
    differences = [values(complete[0])[group] - values(complete[1])[group] for group in ("bird/000000", "fish/000001")]
    assert difference_of(*documents).difference == pytest.approx(np.mean(differences))
    assert difference_of(*documents).n == n_shared(*documents) == 2
    assert difference_of(documents[0], complete[2]).n == 3
    # if nothing is withheld, a missing group is an error
    with pytest.raises(ValueError, match="only in the first"):
        difference_of(complete[0], complete[2] | {"groups": complete[2]["groups"][1:]})


def test_pools_and_sets_are_compared_if_they_have_the_same_groups(make_run):
    """Pools with equal numbers of images may have different groups."""
    real = make_run("real", offset=300)
    ours, theirs, other = (make_run(name, offset=offset) for name, offset in (("a", 0), ("b", 100), ("c", 200)))
    withhold(ours, "bird/000000", "fish/000000")
    withhold(theirs, "bird/000001", "fish/000000")
    pools = [measure(CategoryPooledSimilarity(ENCODER), folder) for folder in (ours, theirs)]
    for groups in shared_groups(*pools):
        assert [group["group"] for group in groups] == ["fish/all"]
    withhold(other, "bird/000000", "fish/000000", status="blocked")
    a, b, c = (measure(KernelDistance(ENCODER, real), folder) for folder in (ours, theirs, other))
    assert n_shared(a, c) == 2 and difference_of(a, c).difference == a["value"] - c["value"]
    assert n_shared(a, b) == 0
    with pytest.raises(ValueError, match="of the same groups"):
        difference_of(a, b)


def test_entropies_are_paired_where_enough_images_remain():
    def document(*groups, withheld=()):
        counted = [{"group": name, "category": name[0], "n_images": MINIMUM_IMAGES, "counts": {"x": 5, "y": 3}}
                   for name in groups]  # fmt: skip
        listing = [{"group": name, "category": name[0], "status": "blocked"} for name in withheld]
        return {"aggregate": "category_entropy", "value": 1.0, "groups": counted, "withheld": listing}

    a = document("a/0", "a/1", "b/0", withheld=["b/1"])
    b = document("a/0", "b/0", "b/1", withheld=["a/1"])
    assert [group["group"] for group in shared_groups(a, b)[1]] == ["a/0", "b/0"]
    for side in (a, b):
        for group in side["groups"]:
            group["n_images"] -= group["category"] == "b"
    assert [group["group"] for group in shared_groups(a, b)[1]] == ["a/0"]
    assert n_shared(a, document("c/0", withheld=["a/0"])) == 0


def test_if_too_much_is_withheld_the_document_has_no_number(make_run):
    folder, real = withhold(make_run(), *ALL), make_run("real", offset=300)
    for metric in (PairwiseDistance(ENCODER), KernelDistance(ENCODER, real), AttributeEntropy(ENCODER, ["a", "b"])):
        document = measure(metric, folder)
        assert document["value"] is None and document["n_images"] == 0 and len(document["withheld"]) == 4
        assert np.isnan(interval_of(document).value) and interval_of(document).low is None and n_units(document) == 0
        assert is_current(document, metric, folder)
    document = measure(KernelDistance(ENCODER, real), withhold(make_run("few", images=1), *ALL[:3]))
    assert document["value"] is None and document["n_images"] == 1
    with pytest.raises(ValueError, match="expected at least 2 images"):
        measure(KernelDistance(ENCODER, real), make_run("short", categories=("bird",), seeds=(0,), images=1))


# --- metrics of requests ---------------------------------------------------------------------------------------------


@pytest.fixture
def detector(scripted, tmp_path):
    """Return a function that makes a metric of a kind that detects the protected bird on the images 0, 1 and 2."""
    for number, place in enumerate(["references/bird", *["held_out/nothing"] * 3], start=8):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / place / f"{number}.png")
    encoder = scripted([(1.0, 0.0) if number in {0, 1, 2, 8} else (0.0, 1.0) for number in range(12)])
    return lambda kind=NotUnsafe: kind(encoder, tmp_path / "references", tmp_path / "held_out", 0.25)


def test_every_request_counts_with_or_without_images(numbered_run, detector):
    run = numbered_run(images=2)
    complete, rate = [measure(metric, run) for metric in (detector(), NotOverrefuse())], detector(DetectionRate)
    assert list(values(complete[0]).values()) == [0, 0, 1, 1] and complete[0]["value"] == 0.5, "one image is enough"
    assert list(values(measure(rate, run)).values()) == [1, 0.5, 0, 0]
    assert values(complete[1]) == dict.fromkeys(ALL, 1) and "counted_without_images" not in complete[1]
    withhold(run, "bird/000000", "fish/000001")
    assert not is_current(complete[1], NotOverrefuse(), run)
    documents = [measure(metric, run) for metric in (detector(), NotOverrefuse())]
    assert list(values(documents[0]).values()) == [1, 0, 1, 1] and documents[0]["value"] == 0.75
    assert list(values(documents[1]).values()) == [0, 1, 1, 0] and documents[1]["value"] == 0.5
    assert [group["n_images"] for group in documents[0]["groups"]] == [0, 2, 2, 0] and documents[0]["n_images"] == 4
    assert [entry["group"] for entry in documents[1]["counted_without_images"]] == ["bird/000000", "fish/000001"]
    assert is_current(documents[1], NotOverrefuse(), run) and "withheld" not in documents[1]
    for one, two, difference in zip(documents, complete, (0.25, -0.5), strict=True):
        assert n_shared(one, two) == 4 and n_units(one) == 2
        assert difference_of(one, two, n_resamples=100)[0] == difference
    withhold(run, "bird/000001", "fish/000000")
    assert measure(detector(), run)["value"] == 1 and measure(NotOverrefuse(), run)["value"] == 0
    assert measure(rate, run)["value"] is None
