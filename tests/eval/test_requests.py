"""What became of requests: counted whether there are images or not, and 1 and 0 at the two ends as they must be."""

import numpy as np
import pytest
from PIL import Image

from eval.images import WithheldRow, group_rows, read_manifest, write_manifest, write_withheld
from eval.intervals import difference_of, n_shared, n_units
from eval.metric import is_current, measure
from eval.requests import NotOverrefuse, NotUnsafe
from eval.resemblance import DetectionRate

#: Of the eight images of two categories, two groups and two images: a cat is on these.
CATS, GROUPS = {0, 1, 2}, ["cat/000000", "cat/000001", "house/000000", "house/000001"]


@pytest.fixture
def run(numbered_run):
    return numbered_run(categories=("cat", "house"), images=2)


@pytest.fixture
def judge(scripted, tmp_path):
    """A metric of a kind: a picture of a cat to compare with, and three of nothing to calibrate on."""
    for number, place in enumerate(["references/cat", *["held_out/nothing"] * 3], start=8):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / place / f"{number}.png")
    encoder = scripted([(1.0, 0.0) if number in {*CATS, 8} else (0.0, 1.0) for number in range(12)])
    return lambda kind=NotUnsafe: kind(encoder, tmp_path / "references", tmp_path / "held_out", 0.25)


def withhold(folder, *groups):
    rows = group_rows(read_manifest(folder))
    write_withheld(
        folder,
        [
            WithheldRow("refused", "it is protected", prompt_id=row.prompt_id, prompt=row.prompt,
                        category=row.category, group_seed=row.group_seed)
            for row in (rows[group][0] for group in groups)
        ],
    )  # fmt: skip
    write_manifest(folder, [row for group, members in rows.items() if group not in groups for row in members])


def values(document):
    return {group["group"]: group["value"] for group in document["groups"]}


def test_one_image_of_a_request_is_enough(run, judge):
    found, rate = measure(judge(), run), measure(judge(DetectionRate), run)
    assert values(found) == dict(zip(GROUPS, (0, 0, 1, 1), strict=True)) and found["value"] == 0.5
    assert values(rate) == dict(zip(GROUPS, (1, 0.5, 0, 0), strict=True))
    assert values(measure(NotOverrefuse(), run)) == dict.fromkeys(GROUPS, 1)


def test_a_request_without_images_counts(run, judge):
    before = [measure(metric, run) for metric in (judge(), NotOverrefuse())]
    withhold(run, "cat/000000", "house/000001")
    after = [measure(metric, run) for metric in (judge(), NotOverrefuse())]
    assert values(after[0]) == dict(zip(GROUPS, (1, 0, 1, 1), strict=True)) and after[0]["value"] == 0.75
    assert values(after[1]) == dict(zip(GROUPS, (0, 1, 1, 0), strict=True)) and after[1]["value"] == 0.5
    assert [group["n_images"] for group in after[0]["groups"]] == [0, 2, 2, 0] and after[0]["n_images"] == 4
    # a difference is of all requests, since each has a number, whatever became of it
    for one, two, by_hand in zip(after, before, (0.25, -0.5), strict=True):
        assert n_shared(one, two) == 4 and n_units(one) == 2
        assert difference_of(one, two, n_resamples=100, level=0.95, seed=0, cluster="category")[0] == by_hand


def test_what_refuses_everything_stands_at_both_ends(run, judge):
    withhold(run, *GROUPS)
    assert measure(judge(), run)["value"] == 1 and measure(NotOverrefuse(), run)["value"] == 0
    assert measure(judge(DetectionRate), run)["value"] is None


def test_a_document_is_of_the_requests_that_were_withheld(run, judge):
    metric = NotOverrefuse()
    document = measure(metric, run)
    assert is_current(document, metric, run) and "counted_without_images" not in document
    withhold(run, "cat/000000")
    assert not is_current(document, metric, run)
    document = measure(metric, run)
    assert is_current(document, metric, run) and "withheld" not in document
    assert [told["group"] for told in document["counted_without_images"]] == ["cat/000000"]
