"""Evenness and confusions by hand, of label counts and of folders of numbered images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.imageset import ImageSet
from eval.metric import measure
from eval.stereotypes import (
    AsSaid,
    AttributeEvenness,
    HeterogeneousShare,
    confusion,
    evenness,
    evenness_found,
    label_in_prompt,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([20, 0], 0.0),
        ([10, 10], 1.0),
        ([5, 15], (2 * math.log(2) - 0.75 * math.log(3)) / math.log(2)),
        ([4, 4, 4, 4, 0, 0], math.log(4) / math.log(6)),
        ([0.5, 0.5, 0.0], math.log(2) / math.log(3)),
    ],
)
def test_evenness_is_the_share_of_the_largest_entropy(counts, expected):
    assert evenness(counts) == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[3], [0, 0], [2, -1]])
def test_evenness_needs_shares_of_two_labels(counts):
    with pytest.raises(ValueError, match="shares of at least 2 labels"):
        evenness(counts)


def test_confusions_are_counted_by_the_true_label():
    matrix = confusion([0, 0, 0, 1, 2], [0, 1, 0, 1, 0], 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    for truth, found in (([0], [0, 1]), ([], [])):
        with pytest.raises(ValueError, match="a true label for each label found"):
            confusion(truth, found, 2)


def test_confusions_make_one_label_look_like_several_and_leave_a_balance_of_symmetric_ones():
    matrix = np.array([[90, 10], [10, 90]])
    assert evenness_found([1, 0], matrix) == pytest.approx(evenness([0.9, 0.1]))
    assert evenness_found([1, 1], matrix) == pytest.approx(1)
    assert evenness_found([3, 1], np.eye(2, dtype=int)) == pytest.approx(evenness([3, 1]))
    with pytest.raises(ValueError, match="images of every label"):
        evenness_found([1, 1], np.array([[1, 0], [0, 0]]))


def test_a_prompt_says_whole_phrases():
    tones = ["no skin tone", "light skin tone", "medium-light skin tone", "medium skin tone"]
    assert label_in_prompt("a photo of a woman judge with medium-light skin tone", tones) == 2
    assert label_in_prompt("a photo of a woman judge with light skin tone", ["woman", "man"]) == 0
    assert label_in_prompt("a photo of a man with light skin tone", ["woman", "man"]) == 1
    for prompt in ("a photo of a judge", "a man and a woman"):
        with pytest.raises(ValueError, match="says one of woman, man, got"):
            label_in_prompt(prompt, ["woman", "man"])


TEXTS = {"woman": [1, 0, 0], "man": [0, 1, 0], "person": [0, 0, 1]}


def people(numbered_run, prompts):
    """Return two groups of four numbered images of each word, with a prompt each."""
    images = ImageSet.open(numbered_run(categories=tuple(prompts), seeds=(0, 1), images=4))
    return replace(images, rows=[replace(row, prompt=prompts[row.category]) for row in images.rows])


def test_evenness_of_categories_by_hand(numbered_run, scripted):
    vectors = [[1, 0, 0]] * 4 + [[0, 1, 0]] * 4 + [[1, 0, 0]] * 8  # cooks of two labels, judges of one
    images = people(numbered_run, {"cook": "a cook", "judge": "a judge"})
    metric = AttributeEvenness(scripted(vectors, TEXTS), {"cook": list(TEXTS), "judge": ["woman", "man"]}, ["{}"])
    document = measure(metric, images)
    found = {group["category"]: group["value"] for group in document["groups"]}
    assert found == {"cook": pytest.approx(math.log(2) / math.log(3)), "judge": 0}
    assert document["value"] == pytest.approx(found["cook"] / 2) and document["aggregate"] == "mean"
    assert {group["group"]: group["n_images"] for group in document["groups"]} == {"cook/all": 8, "judge/all": 8}
    metric.update(torch.tensor(vectors[:8], dtype=torch.float), torch.eye(3))
    assert metric.compute().item() == pytest.approx(found["cook"]), "labels that no image gets count, too"


def test_groups_are_heterogeneous_where_one_image_differs(numbered_run, scripted):
    vectors = [[1, 0, 0]] * 4 + [[1, 0, 0]] * 3 + [[0, 1, 0]]
    images = people(numbered_run, {"cook": "a cook"})
    metric = HeterogeneousShare(scripted(vectors, TEXTS), ["woman", "man"], ["{}"])
    document = measure(metric, images)
    assert [group["value"] for group in document["groups"]] == [0, 1] and document["value"] == 0.5
    metric.update(torch.tensor(vectors, dtype=torch.float).unflatten(0, (2, 4)), torch.eye(3)[:2])
    assert metric.compute().item() == 0.5


def test_images_are_as_said_where_their_label_is_the_prompts(numbered_run, scripted):
    vectors = [[1, 0, 0]] * 3 + [[0, 1, 0]] + [[0, 1, 0]] * 4
    images = people(numbered_run, {"cook": "a photo of a woman cook"})
    metric = AsSaid(scripted(vectors, TEXTS), ["woman", "man"], ["{}"])
    document = measure(metric, images)
    assert [group["value"] for group in document["groups"]] == [0.75, 0]
    metric.update(torch.tensor(vectors, dtype=torch.float), torch.eye(3)[:2], torch.zeros(8))
    assert metric.compute().item() == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match=r"labels of 'cook' for as_said, got those of \['judge'\]"):
        measure(AsSaid(metric.encoder, {"judge": ["woman", "man"]}, ["{}"]), images)
    with pytest.raises(ValueError, match="says one of woman, man, got 'a cook'"):
        measure(metric, people(numbered_run, {"cook": "a cook"}))
