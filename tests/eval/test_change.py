"""What a method did to images that it should have left alone, in closed form."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.change import Change, ChangedShare
from eval.encoders import Encoder, PixelEncoder
from eval.images import ManifestRow, write_manifest
from eval.imageset import EmbeddingCache, ImageSet
from eval.intervals import difference_of, interval_of
from eval.metric import is_current, measure


class Directions(Encoder):
    """Embeds an image as the unit vector in the plane at the angle, in degrees, of its red corner."""

    name, id = "directions", "directions-1"

    def embed_images(self, images):
        angles = torch.tensor([math.radians(int(image[0, 0, 0])) for image in images])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def write_run(folder, corners, **ids):
    """Write a run: for each group of prompt ids its images, 4 x 4 pixels, by the value of their red corner."""
    rows = []
    for prompt_id, values in corners.items():
        for index, value in enumerate(values):
            path = f"images/{prompt_id}/{index:02d}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((4, 4, 3), 7, np.uint8)
            pixels[0, 0, 0] = value
            Image.fromarray(pixels).save(folder / path)
            rows.append(ManifestRow(path, prompt_id, f"a {prompt_id}", prompt_id, 0, index, index, **ids))
    write_manifest(folder, rows)
    return folder


@pytest.fixture
def baseline(tmp_path):
    return write_run(tmp_path / "none", {"benign-bear": [0, 90], "benign-fox": [10, 20], "direct-panda": [30, 40]})


def values(document):
    return {group["group"].partition("/")[0]: group["value"] for group in document["groups"]}


def metrics(baseline, encoder=None):
    return Change(encoder or Directions(), baseline), ChangedShare(baseline)


def test_an_unchanged_run_is_no_change_at_all(baseline, tmp_path):
    """Exactly 0, so that a run and another one tie; whatever else the manifest and the files' bytes say."""
    copy = tmp_path / "negtome"
    shutil.copytree(baseline, copy)
    for file in copy.rglob("*.png"):
        with Image.open(file) as image:
            image.load()
        image.save(file, compress_level=0)
    for metric in (*metrics(baseline), *metrics(baseline, PixelEncoder(3))):
        for folder in (baseline, copy, write_run(tmp_path / "found", {
            "benign-bear": [0, 90], "benign-fox": [10, 20], "direct-panda": [30, 40]}, references={"panda/1.png": 0.9},
        )):  # fmt: skip
            assert values(measure(metric, folder)) == dict.fromkeys(("benign-bear", "benign-fox", "direct-panda"), 0)


def test_change_is_the_mean_cosine_distance_of_pairs(baseline, tmp_path):
    other = write_run(
        tmp_path / "negtome", {"benign-bear": [60, 90], "benign-fox": [100, 110], "direct-panda": [31, 40]}
    )
    change, share = (measure(metric, other) for metric in metrics(baseline))
    expected = {"benign-bear": (1 - 0.5) / 2, "benign-fox": 1, "direct-panda": (1 - math.cos(math.radians(1))) / 2}
    assert values(change) == pytest.approx(expected, rel=1e-3)
    assert values(share) == {"benign-bear": 0.5, "benign-fox": 1, "direct-panda": 0.5}
    assert change["value"] == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
    assert (change["higher_is_better"], share["higher_is_better"]) == (False, False)
    opposite = write_run(tmp_path / "opposite", {"benign-bear": [180], "benign-fox": [190], "direct-panda": [210]})
    single = write_run(tmp_path / "single", {"benign-bear": [0], "benign-fox": [10], "direct-panda": [30]})
    found = measure(Change(Directions(), single), opposite)
    assert found["value"] == pytest.approx(2) == found["bounds"][1]


def test_images_are_paired_by_their_place_not_by_likeness(baseline, tmp_path):
    swapped = write_run(
        tmp_path / "swapped", {"benign-bear": [90, 0], "benign-fox": [20, 10], "direct-panda": [30, 40]}
    )
    change, share = (values(measure(metric, swapped)) for metric in metrics(baseline))
    assert change["benign-bear"] == pytest.approx(1) and share == {
        "benign-bear": 1, "benign-fox": 1, "direct-panda": 0,
    }  # fmt: skip


def test_one_pixel_by_one_step_counts(baseline, tmp_path):
    copy = tmp_path / "negtome"
    shutil.copytree(baseline, copy)
    file = copy / "images" / "benign-fox" / "01.png"
    pixels = np.array(Image.open(file))
    pixels[3, 3, 2] += 1
    Image.fromarray(pixels).save(file)
    change, share = (values(measure(metric, copy)) for metric in metrics(baseline))
    assert share == {"benign-bear": 0, "benign-fox": 0.5, "direct-panda": 0}
    assert set(change.values()) == {0}, "which this encoder does not see"
    assert values(measure(Change(PixelEncoder(4), baseline), copy))["benign-fox"] > 0
    # Another size is another image.
    Image.new("RGB", (5, 4)).save(file)
    assert values(measure(ChangedShare(baseline), copy))["benign-fox"] == 0.5


def test_only_some_prompts_are_compared(baseline, tmp_path):
    other = write_run(tmp_path / "negtome", {"benign-bear": [60, 90], "benign-fox": [10, 20], "direct-cat": [1]})
    embedded = []

    class Counting(Directions):
        def embed_images(self, images):
            embedded.extend(images)
            return super().embed_images(images)

    for metric in metrics(baseline, Counting()):
        metric.only = ("benign-*",)
        assert set(values(measure(metric, other))) == {"benign-bear", "benign-fox"}
    assert len(embedded) == 8, "of either run, what is compared"


@pytest.mark.parametrize(
    ("corners", "named"),
    [
        ({"benign-bear": [0, 90], "benign-wolf": [10, 20]}, r"1 of them: benign-wolf/000000"),
        ({"benign-bear": [0, 90, 3], "benign-fox": [10, 20]}, r"1 of them: benign-bear/000000"),
        ({"benign-bear": [0]}, r"1 of them: benign-bear/000000"),
        ({"a": [0], "b": [0]}, r"2 of them: a/000000, b/000000"),
    ],
    ids=["another prompt", "more images", "fewer images", "nothing shared"],
)
def test_other_groups_are_an_error(baseline, tmp_path, corners, named):
    other = write_run(tmp_path / "negtome", corners)
    for metric in metrics(baseline):
        with pytest.raises(ValueError, match=rf"{named}; compare runs of the same prompts"):
            measure(metric, other)


def test_documents_follow_both_runs(baseline, tmp_path):
    """The other run's images are part of what a document says; where the run lies is not."""
    other = write_run(tmp_path / "negtome", {"benign-bear": [60, 90], "benign-fox": [10, 20], "direct-panda": [30, 40]})
    cache = EmbeddingCache(tmp_path / "cache")
    moved = tmp_path / "moved"
    shutil.copytree(baseline, moved)
    for metric, again in zip(metrics(baseline), metrics(moved), strict=True):
        document = measure(metric, ImageSet.open(other, cache))
        assert is_current(document, again, other)
        assert document["encoder"]["id"] == {"change": "directions-1", "changed_share": "pixels"}[document["metric"]]
    Image.new("RGB", (4, 4), "white").save(moved / "images" / "benign-fox" / "01.png")
    for metric, again in zip(metrics(baseline), metrics(moved), strict=True):
        assert not is_current(measure(metric, ImageSet.open(other, cache)), again, other)
        again.only = metric.only = ("benign-bear",)
        # Only what is compared counts.
        assert is_current(measure(metric, ImageSet.open(other, cache)), again, other)


def test_intervals_and_differences_stay_in_range(tmp_path):
    prompts = [f"benign-{letter}" for letter in "abcdefgh"]
    none = write_run(tmp_path / "none", {prompt: [0, 0] for prompt in prompts})
    some = write_run(tmp_path / "some", {prompt: [60 * (i % 2), 0] for i, prompt in enumerate(prompts)})
    for metric, value in zip(metrics(none), (0.125, 0.25), strict=True):
        found, nothing = measure(metric, some), measure(metric, none)
        mean, low, high = interval_of(found, n_resamples=200)
        assert mean == pytest.approx(value, rel=1e-5) and 0 <= low < mean < high <= metric.bounds[1]
        difference = difference_of(found, nothing, n_resamples=200)
        assert difference.difference == pytest.approx(value, rel=1e-5) and difference.low > 0
