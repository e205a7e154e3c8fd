"""Entropies with known values, and zero-shot labels with known neighbours."""

import math

import numpy as np
import pytest
import torch

from eval.attributes import AttributeEntropy, label_embeddings, minimum_images, zero_shot_labels
from eval.encoders import Encoder
from eval.intervals import MINIMUM_IMAGES, entropy
from eval.metric import is_current, measure


@pytest.mark.parametrize("labels", [2, 3, 8, 20, 60])
@pytest.mark.parametrize("even", [True, False])
def test_at_the_minimum_little_bias_is_left(labels, even):
    """0.13 nats at most, as stated; with half the images it would be more, but for the fewest labels."""
    rng = np.random.default_rng(0)
    p = np.ones(labels) if even else 1 / np.arange(1, labels + 1)
    p /= p.sum()
    n = minimum_images(labels)
    truth = -(p * np.log(p)).sum()
    assert truth - np.mean([entropy(row) for row in rng.multinomial(n, p, size=4000)]) < 0.13
    if n > 2 * MINIMUM_IMAGES:
        assert truth - np.mean([entropy(row) for row in rng.multinomial(n // 2, p, size=4000)]) > 0.2


class Dictionary(Encoder):
    """Gives texts fixed vectors."""

    name = id = "dictionary"

    def __init__(self, vectors):
        self.vectors = {text: torch.tensor(vector) for text, vector in vectors.items()}

    def embed_images(self, images):
        raise NotImplementedError

    def embed_texts(self, texts):
        return torch.stack([self.vectors[text] for text in texts])


def test_label_embeddings_average_templates():
    encoder = Dictionary(
        {
            "a cat": [1.0, 0, 0],
            "the cat": [0, 1.0, 0],
            "a dog": [0, 0, 1.0],
            "the dog": [0, 0, 1.0],
            "{} {}": [9.0, 0, 0],
        }
    )
    found = label_embeddings(encoder, ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))
    images = torch.tensor([[0.2, 0.1, 0], [0.1, 0.1, 0.9], [0, 3.0, 1.0]])
    assert zero_shot_labels(images, found).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["cat"], ["a {}"], "2 different labels"),
        (["cat", "cat"], ["a {}"], "2 different labels"),
        (["cat", "dog"], ["a photo"], "one {}"),
        (["cat", "dog"], [], "one {}"),
    ],
)
def test_label_embeddings_refuse(labels, templates, message):
    with pytest.raises(ValueError, match=message):
        label_embeddings(Dictionary({}), labels, templates)


def test_attribute_entropy_by_hand(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish", "person"), seeds=(0, 1), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1], "carp": [1, 0], "tuna": [0, 1]}
    birds, fish = [[1, 0]] * 4 + [[0, 1]] * 4, [[1, 0]] * 8
    metric = AttributeEntropy(
        scripted(birds + fish + [[1, 1]] * 8, texts), {"bird": ["hen", "owl"], "fish": ["carp", "tuna"]}, ["{}"]
    )
    document = measure(metric, run)
    assert [group["counts"] for group in document["groups"]] == [{"hen": 4}, {"owl": 4}, {"carp": 4}, {"carp": 4}]
    # birds: log 2 and Miller-Madow's 1 / 16; fish: 0
    assert document["value"] == pytest.approx((math.log(2) + 1 / 16) / 2)
    assert (document["n_groups"], document["n_images"]) == (4, 16)
    assert document["details"] == {"categories_left_out": ["person"], "categories_too_small": {}}
    with pytest.raises(ValueError, match=r"\['dragon'\].*got \['bird'"):
        measure(AttributeEntropy(metric.encoder, {"dragon": ["hen", "owl"]}, ["{}"]), run)


def test_attribute_entropy_refuses_few_images(numbered_run, scripted):
    run = numbered_run(categories=("bird",), seeds=(0,), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1]}
    metric = AttributeEntropy(scripted([[1, 0]] * 4, texts), ["hen", "owl"], ["{}"], name="species_entropy")
    assert metric.name == "species_entropy"
    with pytest.raises(ValueError, match=r"two images a label, and 8 .*species_entropy, got bird: 4 of 8 images"):
        measure(metric, run)
    assert not (run / "metrics").exists(), "a refused number must leave nothing behind"


def test_a_category_with_too_few_images_for_its_labels_is_left_out_and_listed(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish"), seeds=(0, 1), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1], "carp": [1, 0], "tuna": [0, 1], "eel": [1, 1], "ray": [2, 1], "cod": [1, 2]}
    # 8 images are enough for two labels, not for five, however few of the five are seen
    labels = {"bird": ["hen", "owl"], "fish": ["carp", "tuna", "eel", "ray", "cod"]}
    document = measure(AttributeEntropy(scripted([[1, 0]] * 16, texts), labels, ["{}"]), run)
    assert {group["category"] for group in document["groups"]} == {"bird"}
    assert document["details"] == {"categories_left_out": [], "categories_too_small": {"fish": "8 of 10 images"}}


def test_the_plain_entropy_needs_no_two_images_a_label(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish"), seeds=(0, 1), images=4)
    texts = {"carp": [1, 0], "tuna": [0, 1], "eel": [-1, 0], "ray": [0, -1], "cod": [1, -1]}
    encoder = scripted([[1, 0]] * 4 + [[0, 1]] * 4 + [[1, 0]] * 8, texts)
    plain = AttributeEntropy(encoder, list(texts), ["{}"], miller_madow=False)
    document = measure(plain, run)
    assert [(group["group"], group["counts"]) for group in document["groups"]] == [
        ("bird/all", {"carp": 4, "tuna": 4}),
        ("fish/all", {"carp": 8}),
    ]
    assert [group["value"] for group in document["groups"]] == pytest.approx([math.log(2), 0])
    assert document["value"] == pytest.approx(math.log(2) / 2) and document["n_images"] == 16
    corrected = AttributeEntropy(encoder, ["carp", "tuna"], ["{}"])
    assert not is_current(
        measure(corrected, run), AttributeEntropy(encoder, ["carp", "tuna"], ["{}"], miller_madow=False), run
    )
    plain.update(torch.eye(2).repeat(4, 1), torch.eye(2))
    assert plain.compute().item() == pytest.approx(math.log(2))


def test_current_depends_on_labels(numbered_run, scripted):
    run = numbered_run(categories=("bird",), seeds=(0, 1))
    encoder = scripted([[1, 0]] * 8, {text: [1, 0] for text in ("hen", "owl", "jay", "a hen", "a owl")})
    metric = AttributeEntropy(encoder, ["hen", "owl"], ["{}"])
    document = measure(metric, run)
    assert is_current(document, metric, run)
    assert not is_current(document, AttributeEntropy(encoder, ["hen", "jay"], ["{}"]), run)
    assert not is_current(document, AttributeEntropy(encoder, ["hen", "owl"], ["a {}"]), run)
