"""Precision and recall against labels by hand are the naive ones; published images are those that were labelled."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import PROJECT
from experiments.safety.labels import compare, kappa, read_labels, render

CONCEPTS = ["vampire", "goblin", "snail"]
labels = st.sampled_from([*CONCEPTS, "none"])


@given(st.lists(st.tuples(labels, st.sampled_from([*CONCEPTS, None])), min_size=1))
def test_counts_are_those_of_the_naive_formula(pairs):
    counts = compare(*zip(*pairs, strict=True))
    shown, detected = np.array([a != "none" for a, _ in pairs]), np.array([b is not None for _, b in pairs])
    assert (counts.true, counts.false) == ((shown & detected).sum(), (~shown & detected).sum())
    assert (counts.missed, counts.passed) == ((shown & ~detected).sum(), (~shown & ~detected).sum())
    assert counts.named == sum(a == b for a, b in pairs)


@given(st.lists(st.tuples(labels, labels), min_size=1))
def test_kappa_is_agreement_over_that_of_shuffled_labels(pairs):
    one, other = map(list, zip(*pairs, strict=True))
    if len({*one, *other}) > 1:
        agreement = np.mean([a == b for a, b in pairs])
        by_chance = np.mean([a == b for a in one for b in other])  # every label with every other
        assert kappa(one, other) == pytest.approx((agreement - by_chance) / (1 - by_chance))


def test_a_detector_of_everything_and_one_of_nothing():
    rows = pd.DataFrame({"method": "none", "label": ["snail", "none"], "second_label": ["snail", "snail"]})
    page = render({"everything": ["snail", "snail"], "nothing": [None, None]}, rows)
    everything, nothing = (next(line for line in page.splitlines() if name in line) for name in ("every", "nothing "))
    assert "1 of 2" in everything and "1.00 [0.21, 1.00]; 1 of 1" in everything
    assert "0.00 [0.00, 0.79]; 0 of 1" in nothing and "0 of 0" in nothing
    assert "differ for 1 of 2 images" in page


def test_the_published_labels_are_of_the_published_images():
    images, rows = read_labels(PROJECT / "results" / "labels")
    assert images.shape == (200, 128, 128, 3) and len(rows) == 200
    concepts = {folder.name for folder in (PROJECT / "models" / "mini-protected" / "scoring").iterdir()}
    assert {*rows["label"], *rows["second_label"]} <= {*concepts, "none"}


def test_labels_of_other_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images\.webp"):
        read_labels(tmp_path)
    tiles = np.random.default_rng(0).integers(0, 256, (4, 20 * 4, 3), dtype=np.uint8)
    Image.fromarray(tiles).save(tmp_path / "images.webp", lossless=True)
    digests = [hashlib.sha256(np.ascontiguousarray(tiles[:, at : at + 4]).tobytes()).hexdigest() for at in (0, 4)]
    rows = pd.DataFrame({"sha256": digests, "method": "none", "label": "snail", "second_label": "snail"})
    rows.to_csv(tmp_path / "labels.csv", index=False)
    images, _ = read_labels(tmp_path)
    assert (images[1] == tiles[:, 4:8]).all()
    rows[::-1].to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ValueError, match="in the order"):
        read_labels(tmp_path)
