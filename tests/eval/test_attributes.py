"""Entropies with known values, and zero-shot labels with known neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eval.attributes import MINIMUM_IMAGES, entropy, label_embeddings, minimum_images, zero_shot_labels
from eval.encoders import Encoder


@pytest.mark.parametrize(
    ("counts", "plug_in", "seen"),
    [
        ([8, 0, 0], 0.0, 1),
        ([4, 4], math.log(2), 2),
        ([5, 5, 5, 5, 0], math.log(4), 4),
        ([6, 3, 3], 1.5 * math.log(2), 3),
    ],
)
def test_known_entropies(counts, plug_in, seen):
    n = sum(counts)
    assert entropy(counts, miller_madow=False) == pytest.approx(plug_in)
    assert entropy(counts) == pytest.approx(plug_in + (seen - 1) / (2 * n))


def test_entropy_takes_many_histograms():
    counts = np.random.default_rng(0).integers(0, 9, (3, 5, 4)) + 2
    found = entropy(counts)
    assert found.shape == (3, 5)
    assert found[1, 2] == pytest.approx(float(entropy(counts[1, 2])))


def test_miller_madow_removes_most_of_the_bias():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(40, np.full(8, 1 / 8), size=4000)
    plug_in = math.log(8) - entropy(counts, miller_madow=False).mean()
    corrected = math.log(8) - entropy(counts).mean()
    assert plug_in > 0.07
    assert abs(corrected) < 0.1 * plug_in


def test_small_n_is_refused():
    assert entropy([MINIMUM_IMAGES, 0]) == 0
    with pytest.raises(ValueError, match=f"at least {MINIMUM_IMAGES} images.*got {MINIMUM_IMAGES - 1}"):
        entropy([MINIMUM_IMAGES - 1, 0])
    with pytest.raises(ValueError, match="got 0"):
        entropy([0, 0], minimum=0)


@pytest.mark.parametrize("labels", [2, 3, 8, 20, 60])
@pytest.mark.parametrize("even", [True, False])
def test_at_the_minimum_little_bias_is_left(labels, even):
    """0.13 nats at most, as stated; with half the images it would be more, but for the fewest labels."""
    rng = np.random.default_rng(0)
    p = np.ones(labels) if even else 1 / np.arange(1, labels + 1)
    p /= p.sum()
    n = minimum_images(labels)
    truth = -(p * np.log(p)).sum()
    assert truth - entropy(rng.multinomial(n, p, size=4000)).mean() < 0.13
    if n > 2 * MINIMUM_IMAGES:
        assert truth - entropy(rng.multinomial(n // 2, p, size=4000)).mean() > 0.2


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
