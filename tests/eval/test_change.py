"""How much a method changed images that it should not have changed, in closed form."""

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
from eval.metric import is_current, measure

BASELINE = {"benign-bear": [0, 90], "benign-fox": [10, 20], "direct-panda": [30, 40]}


class Directions(Encoder):
    """Embeds an image as the unit vector in the plane whose angle, in degrees, is its red corner."""

    name, id = "directions", "directions-1"

    def embed_images(self, images):
        angles = torch.tensor([math.radians(int(image[0, 0, 0])) for image in images])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes a run of 4 x 4 images: for each prompt_id the values of their red corners."""

    def write(name, corners, **fields):
        rows = []
        for prompt_id, values in corners.items():
            (tmp_path / name / prompt_id).mkdir(parents=True)
            for index, value in enumerate(values):
                pixels = np.full((4, 4, 3), 7, np.uint8)
                pixels[0, 0, 0] = value
                path = f"{prompt_id}/{index:02d}.png"
                Image.fromarray(pixels).save(tmp_path / name / path)
                rows.append(ManifestRow(path, prompt_id, f"a {prompt_id}", prompt_id, 0, index, index, **fields))
        write_manifest(tmp_path / name, rows)
        return tmp_path / name

    return write


@pytest.fixture
def baseline(write_run):
    return write_run("none", BASELINE)


def values(document):
    return {group["group"].partition("/")[0]: group["value"] for group in document["groups"]}


def metrics(baseline, encoder=None):
    return Change(encoder or Directions(), baseline), ChangedShare(baseline)


def test_an_unchanged_run_has_a_change_of_exactly_0(baseline, tmp_path, write_run):
    """Whatever else differs in the manifest and in the bytes of the files."""
    copy = shutil.copytree(baseline, tmp_path / "negtome")
    for file in copy.rglob("*.png"):
        with Image.open(file) as image:
            image.load()
        image.save(file, compress_level=0)
    other = write_run("other", BASELINE, references={"panda/1.png": 0.9})
    for metric in (*metrics(baseline), *metrics(baseline, PixelEncoder(3))):
        for folder in (baseline, copy, other):
            assert values(measure(metric, folder)) == dict.fromkeys(BASELINE, 0)


def test_change_is_the_mean_cosine_distance_of_pairs(baseline, write_run):
    other = write_run("negtome", {"benign-bear": [60, 90], "benign-fox": [100, 110], "direct-panda": [31, 40]})
    change, share = (measure(metric, other) for metric in metrics(baseline))
    expected = {"benign-bear": (1 - 0.5) / 2, "benign-fox": 1, "direct-panda": (1 - math.cos(math.radians(1))) / 2}
    assert values(change) == pytest.approx(expected, rel=1e-3)
    assert values(share) == {"benign-bear": 0.5, "benign-fox": 1, "direct-panda": 0.5}
    assert change["value"] == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
    assert (change["higher_is_better"], share["higher_is_better"]) == (False, False)
    # images are paired by their position, not by similarity
    swapped = write_run("swapped", {name: corners[::-1] for name, corners in BASELINE.items()})
    change, share = (values(measure(metric, swapped)) for metric in metrics(baseline))
    assert change["benign-bear"] == pytest.approx(1) and share == dict.fromkeys(BASELINE, 1)
    single, opposite = (write_run(f"from {angle}", {"bear": [angle], "fox": [angle + 10]}) for angle in (0, 180))
    document = measure(Change(Directions(), single), opposite)
    assert document["value"] == pytest.approx(2) == document["bounds"][1]


def test_one_pixel_by_one_step_counts(baseline, tmp_path):
    copy = shutil.copytree(baseline, tmp_path / "negtome")
    file = copy / "benign-fox" / "01.png"
    pixels = np.array(Image.open(file))
    pixels[3, 3, 2] += 1
    Image.fromarray(pixels).save(file)
    change, share = (values(measure(metric, copy)) for metric in metrics(baseline))
    assert share == {"benign-bear": 0, "benign-fox": 0.5, "direct-panda": 0}
    assert set(change.values()) == {0}, "this encoder does not see it"
    assert values(measure(Change(PixelEncoder(4), baseline), copy))["benign-fox"] > 0
    Image.new("RGB", (5, 4)).save(file)
    assert values(measure(ChangedShare(baseline), copy))["benign-fox"] == 0.5, "another size is another image"


@pytest.mark.parametrize(
    ("corners", "named"),
    [
        ({"benign-bear": [0, 90], "benign-wolf": [10, 20]}, r"1 of them: benign-wolf/000000"),
        ({"benign-bear": [0, 90, 3], "benign-fox": [10, 20]}, r"1 of them: benign-bear/000000"),
        ({"a": [0], "b": [0]}, r"2 of them: a/000000, b/000000"),
    ],
)
def test_other_groups_are_an_error(baseline, write_run, corners, named):
    other = write_run("negtome", corners)
    with pytest.raises(ValueError, match=rf"{named}; compare runs of the same prompts"):
        measure(ChangedShare(baseline), other)


def test_documents_follow_the_images_of_both_runs(baseline, tmp_path, write_run):
    other = write_run("negtome", BASELINE | {"benign-bear": [60, 90]})
    cache = EmbeddingCache(tmp_path / "cache")
    moved = shutil.copytree(baseline, tmp_path / "moved")
    documents = [measure(metric, ImageSet.open(other, cache)) for metric in metrics(baseline)]
    assert [document["encoder"]["id"] for document in documents] == ["directions-1", "pixels"]
    assert all(is_current(document, again, other) for document, again in zip(documents, metrics(moved), strict=True))
    Image.new("RGB", (4, 4), "white").save(moved / "benign-fox" / "01.png")
    for document, metric, again in zip(documents, metrics(baseline), metrics(moved), strict=True):
        assert not is_current(document, again, other)
        again.only = metric.only = ("benign-bear",)
        assert is_current(measure(metric, ImageSet.open(other, cache)), again, other), "only compared images count"
