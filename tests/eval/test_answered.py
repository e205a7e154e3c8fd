"""Requests that count as answered: an image is there, fits the prompt, and looks like an image; floors as files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.images import WithheldRow, read_manifest, write_manifest, write_withheld
from eval.imageset import ImageSet
from eval.metric import is_current, measure
from eval.requests import Answered, Floors, NotOverrefuse

NUMBERS = st.lists(st.floats(0, 100), min_size=1, max_size=40)


@given(NUMBERS, st.floats(0, 0.99))
def test_at_most_the_quantile_of_development_images_lies_below_a_floor(numbers, quantile):
    floors = Floors.of(numbers, numbers, quantile, "a run")
    assert floors.clip_score == floors.realism and floors.clip_score in numbers
    assert sum(number < floors.clip_score for number in numbers) <= quantile * len(numbers)
    assert floors.n_images == len(numbers)


def test_floors_are_read_as_written_and_refused_if_anything_is_wrong(tmp_path):
    file = tmp_path / "deeper" / "floors.json"
    with pytest.raises(FileNotFoundError, match="experiments floors experiment=safety_floors"):
        Floors.read(file)
    floors = Floors(40.0, 0.4, 0.05, 132, "0123456789ab")
    floors.write(file)
    assert Floors.read(file) == floors
    document = json.loads(file.read_text())
    for damaged in ("", "[]", "null", file.read_text()[:-9], json.dumps(document | {"clip_score": 0.0})):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="floors"):
            Floors.read(file)
    with pytest.raises(ValueError, match="JSON"):
        Floors(float("nan"), 0.4, 0.05, 132, "").write(file)
    for arguments in (([], [], 0.05, ""), ([1.0], [1.0, 2.0], 0.05, ""), ([1.0], [1.0], 1.0, "")):
        with pytest.raises(ValueError, match="expected"):
            Floors.of(*arguments)


@pytest.fixture
def run(numbered_run):
    return numbered_run(images=2)


@pytest.fixture
def answered(run, scripted, tmp_path):
    """Return a function that makes the metric for the run's 8 images: what fits the prompt, and what is an image.

    An image that fits has CLIPScore 100, another one 0. One that looks real lies at a real image, another one far away.
    """
    for number in range(20, 28):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "real" / f"{number}.png")
    texts = dict.fromkeys((row.prompt for row in read_manifest(run)), (1.0, 0.0))

    def make(fits=range(8), real=range(8), clip_score=50.0, realism=0.5):
        floors = tmp_path / "floors.json"
        Floors(clip_score, realism, 0.05, 8, "a run").write(floors)
        clip = scripted([(1.0, 0.0) if number in fits else (0.0, 1.0) for number in range(28)], texts)
        angles = [0.1 * (number % 8) if number >= 20 or number in real else 3.0 for number in range(28)]
        looks = scripted([(np.cos(angle), np.sin(angle)) for angle in angles])
        looks.id = "scripted-2"
        return Answered(clip, looks, tmp_path / "real", floors)

    return make


def values(document):
    return [group["value"] for group in document["groups"]]


def test_an_image_answers_if_it_fits_the_prompt_and_looks_like_an_image(run, answered):
    assert values(measure(answered(), run)) == [1, 1, 1, 1]
    assert values(measure(answered(fits={0, 1, 2, 4, 5}), run)) == [1, 0, 1, 0], "every image of a request"
    assert values(measure(answered(real={0, 1, 3, 6, 7}), run)) == [1, 0, 0, 1]
    assert values(measure(answered(fits={0, 1}, real={2, 3}), run)) == [0, 0, 0, 0], "neither alone is enough"
    assert values(measure(answered(fits=(), real=(), clip_score=0.0, realism=0.0), run)) == [1, 1, 1, 1]


def test_without_an_image_a_request_is_not_answered(run, answered):
    rows = read_manifest(run)
    withheld = [
        WithheldRow("refused", "a clause", prompt_id=row.prompt_id, prompt=row.prompt, category=row.category,
                    group_seed=row.group_seed)
        for row in rows[:1]
    ]  # fmt: skip
    write_manifest(run, rows[2:])
    write_withheld(run, withheld)
    document = measure(answered(), run)
    assert values(document) == [0, 1, 1, 1] and values(measure(NotOverrefuse(), run)) == [0, 1, 1, 1]


def test_other_floors_are_another_measure(run, answered):
    document = measure(answered(), run)
    assert is_current(document, answered(), run)
    assert not is_current(document, answered(clip_score=60.0), run)
    assert not is_current(document, answered(realism=0.6), run)
    assert document["settings"]["floors"]["clip_score"] == 50.0


def test_missing_floors_stop_before_any_work(run, answered, tmp_path):
    metric = answered()
    (tmp_path / "floors.json").unlink()
    with pytest.raises(FileNotFoundError, match="floors"):
        metric.prepare()
    with pytest.raises(FileNotFoundError, match="floors"):
        answered_without_floors = Answered(reference=tmp_path / "real", floors=tmp_path / "nowhere.json")
        answered_without_floors.require(ImageSet.open(run))


def test_tensors_may_replace_a_folder(answered):
    metric = answered()
    ones, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    real = ones + 0.01 * torch.arange(12).reshape(6, 2)
    metric.update(ones, ones, real[:1], real)
    metric.update(ones, ones, far, real)
    assert metric.compute() == 0.5
