"""Zero-shot labels with known neighbours, and what is computed of their counts by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.attributes import AttributeEntropy, label_embeddings, minimum_images, zero_shot_labels
from eval.imageset import ImageSet
from eval.intervals import MINIMUM_IMAGES, entropy
from eval.metric import is_current, measure
from eval.stereotypes import (
    AsSaid,
    AttributeEvenness,
    HeterogeneousShare,
    confusion,
    evenness,
    evenness_found,
    label_in_prompt,
)

SPECIES = {"hen": [1, 0], "owl": [0, 1], "carp": [1, 0], "tuna": [0, 1], "eel": [-1, 0], "ray": [0, -1], "cod": [1, -1]}
TEXTS = {"woman": [1, 0, 0], "man": [0, 1, 0], "person": [0, 0, 1]}


@pytest.mark.parametrize("labels", [2, 8, 60])
@pytest.mark.parametrize("even", [True, False])
def test_at_the_minimum_little_bias_is_left(labels, even):
    """At most 0.13 nats, as documented; half the images would leave more, except for the fewest labels."""
    rng = np.random.default_rng(0)
    p = np.ones(labels) if even else 1 / np.arange(1, labels + 1)
    p /= p.sum()
    n, truth = minimum_images(labels), -(p * np.log(p)).sum()
    assert truth - np.mean([entropy(row) for row in rng.multinomial(n, p, size=500)]) < 0.14
    if n > 2 * MINIMUM_IMAGES:
        assert truth - np.mean([entropy(row) for row in rng.multinomial(n // 2, p, size=500)]) > 0.2


def test_label_embeddings_average_templates(scripted):
    texts = {"a cat": [1, 0, 0], "the cat": [0, 1, 0], "a dog": [0, 0, 1], "the dog": [0, 0, 1]}
    embeddings = label_embeddings(scripted([], texts), ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(embeddings, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))
    images = torch.tensor([[0.2, 0.1, 0], [0.1, 0.1, 0.9], [0, 3.0, 1.0]])
    assert zero_shot_labels(images, embeddings).tolist() == [0, 1, 0]
    for labels, templates, message in (
        (["cat"], ["a {}"], "2 different labels"),
        (["cat", "cat"], ["a {}"], "2 different labels"),
        (["cat", "dog"], ["a photo"], "one {}"),
        (["cat", "dog"], [], "one {}"),
    ):
        with pytest.raises(ValueError, match=message):
            label_embeddings(scripted([], texts), labels, templates)


def test_attribute_entropy_by_hand(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish", "person"))
    encoder = scripted([[1, 0]] * 4 + [[0, 1]] * 4 + [[1, 0]] * 8 + [[1, 1]] * 8, SPECIES)
    labels = {"bird": ["hen", "owl"], "fish": ["carp", "tuna"]}
    document = measure(AttributeEntropy(encoder, labels, ["{}"]), run)
    assert [group["counts"] for group in document["groups"]] == [{"hen": 4}, {"owl": 4}, {"carp": 4}, {"carp": 4}]
    # birds: log 2 and Miller-Madow's 1 / 16; fish: 0
    assert document["value"] == pytest.approx((math.log(2) + 1 / 16) / 2)
    assert (document["n_groups"], document["n_images"]) == (4, 16)
    assert document["details"] == {"categories_left_out": ["person"], "categories_too_small": {}}
    # 8 images are enough for two labels, not for five, however few of the five are seen
    labels["fish"] = ["carp", "tuna", "eel", "ray", "cod"]
    document = measure(AttributeEntropy(encoder, labels, ["{}"]), run)
    assert {group["category"] for group in document["groups"]} == {"bird"}
    assert document["details"]["categories_too_small"] == {"fish": "8 of 10 images"}
    with pytest.raises(ValueError, match=r"\['dragon'\].*got \['bird'"):
        measure(AttributeEntropy(encoder, {"dragon": ["hen", "owl"]}, ["{}"]), run)


def test_the_plug_in_entropy_needs_no_two_images_per_label(numbered_run, scripted):
    run = numbered_run()
    encoder = scripted([[1, 0]] * 4 + [[0, 1]] * 4 + [[1, 0]] * 8, SPECIES)
    metric = AttributeEntropy(encoder, ["carp", "tuna", "eel", "ray", "cod"], ["{}"], miller_madow=False)
    document = measure(metric, run)
    counts = {group["group"]: group["counts"] for group in document["groups"]}
    assert counts == {"bird/all": {"carp": 4, "tuna": 4}, "fish/all": {"carp": 8}}
    assert [group["value"] for group in document["groups"]] == pytest.approx([math.log(2), 0])
    assert document["value"] == pytest.approx(math.log(2) / 2) and document["n_images"] == 16
    metric.update(torch.eye(2).repeat(4, 1), torch.eye(2))
    assert metric.compute().item() == pytest.approx(math.log(2))


def test_a_document_follows_labels_templates_and_estimate_and_few_images_are_refused(numbered_run, scripted):
    encoder = scripted([[1, 0]] * 8, SPECIES | {"a hen": [1, 0], "a owl": [1, 0]})
    run, few = numbered_run(categories=("bird",)), numbered_run(name="few", categories=("bird",), seeds=(0,))
    metric = AttributeEntropy(encoder, ["hen", "owl"], ["{}"], name="species_entropy")
    document = measure(metric, run)
    assert metric.name == "species_entropy" and is_current(document, metric, run)
    others = (
        AttributeEntropy(encoder, ["hen", "ray"], ["{}"], name=metric.name),
        AttributeEntropy(encoder, ["hen", "owl"], ["a {}"], name=metric.name),
        AttributeEntropy(encoder, ["hen", "owl"], ["{}"], name=metric.name, miller_madow=False),
    )
    assert not any(is_current(document, other, run) for other in others)
    with pytest.raises(ValueError, match=r"two images a label, and 8 .*species_entropy, got bird: 4 of 8 images"):
        measure(metric, few)
    assert not (few / "metrics").exists(), "a refused number leaves no file"


# --- stereotypes -----------------------------------------------------------------------------------------------------


def test_evenness_is_the_share_of_the_largest_entropy_and_confusions_change_it():
    for counts, expected in (
        ([20, 0], 0.0),
        ([10, 10], 1.0),
        ([5, 15], (2 * math.log(2) - 0.75 * math.log(3)) / math.log(2)),
        ([4, 4, 4, 4, 0, 0], math.log(4) / math.log(6)),
    ):
        assert evenness(counts) == pytest.approx(expected)
    matrix = np.array([[90, 10], [10, 90]])
    assert evenness_found([1, 0], matrix) == pytest.approx(evenness([0.9, 0.1]))
    assert evenness_found([1, 1], matrix) == pytest.approx(1)
    assert confusion([0, 0, 0, 1, 2], [0, 1, 0, 1, 0], 3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    for compute, message in (
        (lambda: evenness([2, -1]), "shares of at least 2 labels"),
        (lambda: evenness([0, 0]), "shares of at least 2 labels"),
        (lambda: confusion([], [], 2), "a true label for each label found"),
        (lambda: evenness_found([1, 1], np.array([[1, 0], [0, 0]])), "images of every label"),
    ):
        with pytest.raises(ValueError, match=message):
            compute()


def test_a_prompt_names_whole_words():
    tones = ["no skin tone", "light skin tone", "medium-light skin tone", "medium skin tone"]
    assert label_in_prompt("a photo of a woman judge with medium-light skin tone", tones) == 2
    assert label_in_prompt("a photo of a woman judge with light skin tone", ["woman", "man"]) == 0
    assert label_in_prompt("a photo of a man with light skin tone", ["woman", "man"]) == 1
    for prompt in ("a photo of a judge", "a man and a woman"):
        with pytest.raises(ValueError, match="says one of woman, man, got"):
            label_in_prompt(prompt, ["woman", "man"])


def people(numbered_run, prompts):
    """Return two groups of four numbered images for each category {category: prompt}."""
    images = ImageSet.open(numbered_run(categories=tuple(prompts)))
    return replace(images, rows=[replace(row, prompt=prompts[row.category]) for row in images.rows])


def test_evenness_of_categories_by_hand(numbered_run, scripted):
    vectors = [[1, 0, 0]] * 4 + [[0, 1, 0]] * 4 + [[1, 0, 0]] * 8  # cooks of two labels, judges of one
    images = people(numbered_run, {"cook": "a cook", "judge": "a judge"})
    metric = AttributeEvenness(scripted(vectors, TEXTS), {"cook": list(TEXTS), "judge": ["woman", "man"]}, ["{}"])
    document = measure(metric, images)
    values = {group["category"]: group["value"] for group in document["groups"]}
    assert values == {"cook": pytest.approx(math.log(2) / math.log(3)), "judge": 0}
    assert document["value"] == pytest.approx(values["cook"] / 2) and document["aggregate"] == "mean"
    assert {group["group"]: group["n_images"] for group in document["groups"]} == {"cook/all": 8, "judge/all": 8}
    metric.update(torch.tensor(vectors[:8], dtype=torch.float), torch.eye(3))
    assert metric.compute().item() == pytest.approx(values["cook"]), "labels that no image gets count too"


def test_heterogeneous_groups_and_named_labels_by_hand(numbered_run, scripted):
    vectors = [[1, 0, 0]] * 7 + [[0, 1, 0]]
    encoder, tensor = scripted(vectors, TEXTS), torch.tensor(vectors, dtype=torch.float)
    images = people(numbered_run, {"cook": "a photo of a woman cook"})
    share, accuracy = (kind(encoder, ["woman", "man"], ["{}"]) for kind in (HeterogeneousShare, AsSaid))
    documents = [measure(metric, images) for metric in (share, accuracy)]
    assert [[group["value"] for group in document["groups"]] for document in documents] == [[0, 1], [1, 0.75]]
    share.update(tensor.unflatten(0, (2, 4)), torch.eye(3)[:2])
    accuracy.update(tensor, torch.eye(3)[:2], torch.zeros(8))
    assert (share.compute().item(), accuracy.compute().item()) == (0.5, pytest.approx(7 / 8))
    with pytest.raises(ValueError, match=r"labels of 'cook' for as_said, got those of \['judge'\]"):
        measure(AsSaid(encoder, {"judge": ["woman", "man"]}, ["{}"]), images)
    with pytest.raises(ValueError, match="says one of woman, man, got 'a cook'"):
        measure(accuracy, people(numbered_run, {"cook": "a cook"}))
