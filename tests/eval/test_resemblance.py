"""Planted concepts are found, and a calibrated threshold keeps its promise for new images."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.encoders import PixelEncoder
from eval.images import ManifestRow
from eval.imageset import EmbeddingCache, ImageSet
from eval.metric import is_current, measure
from eval.resemblance import (
    AnyResemblance,
    DetectionRate,
    ExcessResemblance,
    FloorResemblance,
    Identification,
    Likeness,
    MaximumResemblance,
    MeanResemblance,
    calibrate_threshold,
    similarities,
)

CONCEPTS = ("cat", "robot", "star")
ENCODER = PixelEncoder(4)


def picture(path, concept, seed):
    """Save an image of a concept's pattern, or of a random pattern for None, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    source = generator if concept is None else np.random.default_rng(1000 + CONCEPTS.index(concept))
    pattern = source.integers(0, 2, (4, 4, 3)) * 200
    pixels = pattern.repeat(4, 0).repeat(4, 1) + generator.integers(0, 12, (16, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def references(tmp_path):
    for number, concept in enumerate(CONCEPTS):
        for index in range(2):
            picture(tmp_path / "references" / concept / f"{index}.png", concept, 10 * number + index)
    return tmp_path / "references"


@pytest.fixture
def made(tmp_path):
    """Groups of four: all cats; two robots and two stars for the prompt "robot"; no concept for the prompt "house"."""
    contents = {"cat": ["cat"] * 4, "robot": ["robot", "robot", "star", "star"], "house": [None] * 4}
    for number, (prompt, images) in enumerate(contents.items()):
        for index, concept in enumerate(images):
            picture(tmp_path / "made" / prompt / f"{index}.png", concept, 500 + 10 * number + index)
    return tmp_path / "made"


@pytest.fixture
def held_out(tmp_path):
    for index in range(39):
        picture(tmp_path / "held out" / "other" / f"{index:02d}.png", None, 2000 + index)
    for index in range(4):
        picture(tmp_path / "held out" / "cat" / f"{index}.png", "cat", 3000 + index)
    return tmp_path / "held out"


def values(document):
    return {group["category"]: group["value"] for group in document["groups"]}


def test_similarities_by_hand_whatever_scale_order_and_company():
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8, -0.6], [0, 1, 0]]).double()
    torch.testing.assert_close(similarities(embeddings, references), expected)
    torch.testing.assert_close(similarities(5 * embeddings[:1], references.flip(0)), expected[:1].flip(1))
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    own = similarities(x, x)
    assert own.diagonal().tolist() == pytest.approx([1] * 9) and own.max() <= 1
    for wrong, message in ((x[:0], "at least one reference"), (x[:, :2], "one encoder"), (0 * x, "not zero")):
        with pytest.raises(ValueError, match=message):
            similarities(x, wrong)
    with pytest.raises(ValueError, match="finite"):
        similarities(x * math.nan, x)


def test_calibration_by_hand():
    negative = torch.arange(1, 20).double() / 100  # 19 negatives: 5 % of 20 is one image
    assert calibrate_threshold(negative, 0.05) == pytest.approx(0.19)
    assert calibrate_threshold(negative.flip(0), 0.1) == pytest.approx(0.18)
    for arguments, message in (
        ((torch.rand(18), 0.05), "at least 19 negatives .* got 18"),
        (([], 0.01), "at least 99 negatives"),
        *(((torch.rand(50), rate), "between 0 and 1") for rate in (0, 1, math.nan)),
        (([math.nan, *range(50)],), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_threshold(*arguments)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_new_negatives_are_detected_at_the_stated_rate(rate, n=19):
    generator = torch.Generator().manual_seed(0)
    thresholds = [calibrate_threshold(torch.randn(n, generator=generator), rate) for _ in range(500)]
    # the exact chance that a new standard normal number is above the threshold
    rates = [0.5 * math.erfc(threshold / math.sqrt(2)) for threshold in thresholds]
    margin = 4 * np.std(rates) / math.sqrt(len(rates))
    # no larger than the rate, and no smaller than the number of negatives requires
    assert rate - 1 / (n + 1) - margin < np.mean(rates) < rate + margin


def test_the_planted_concepts_are_found(made, references):
    document = measure(Identification(ENCODER, references), made)
    details = document["details"]
    assert values(document) == {"cat": 1, "robot": 0.5} and details["categories_left_out"] == ["house"]
    assert sum(details["nearest"].values()) == 12 and details["nearest"]["robot"] >= 2
    assert (details["n_assets"], details["n_references"], details["references"]) == (3, 6, "references")
    of_any, likeness = (measure(kind(ENCODER, references), made) for kind in (AnyResemblance, Likeness))
    assert min(values(of_any)["cat"], values(of_any)["robot"]) > 0.99 > values(of_any)["house"]
    assert values(likeness) == values(of_any) and likeness["higher_is_better"] and not of_any["higher_is_better"]
    assert Likeness().score(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).tolist() == [0]
    # Two of the images for "robot" are stars, which resemble a reference, but no robot.
    maxima = values(measure(MaximumResemblance(ENCODER, references), made))
    assert maxima.keys() == {"cat", "robot"} and maxima["cat"] > 0.99 > maxima["robot"]
    shutil.rmtree(references / "star")
    without = values(measure(MaximumResemblance(ENCODER, references), made))
    assert without == pytest.approx(maxima), "other concepts change nothing"


@pytest.mark.parametrize(("kind", "of"), [(MaximumResemblance, max), (MeanResemblance, np.mean), (AnyResemblance, max)])
def test_metrics_are_naive_loops_over_the_references(made, references, kind, of):
    images, pictures = ImageSet.open(made), ImageSet.open(references)
    x, y = (image_set.embeddings(ENCODER).double().numpy() for image_set in (images, pictures))
    expected = {}
    for row, image in zip(images.rows, x, strict=True):
        cosines = [
            image @ other / np.linalg.norm(image) / np.linalg.norm(other)
            for reference, other in zip(pictures.rows, y, strict=True)
            if kind is AnyResemblance or reference.category == row.category
        ]
        if cosines:
            expected.setdefault(row.category, []).append(of(cosines))
    document = measure(kind(ENCODER, references), images)
    assert values(document) == pytest.approx({category: np.mean(scores) for category, scores in expected.items()})
    assert document["value"] == pytest.approx(np.mean([*expected.values()]))
    assert document["details"].get("categories_left_out", []) == ([] if kind is AnyResemblance else ["house"])


def test_floor_and_excess_by_hand(made, references):
    vectors = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1], [-1, 0]])  # two references of concept 0, one of each other
    floor, excess = FloorResemblance(), ExcessResemblance()
    images, concepts, wanted = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1])
    assert floor.score(images, vectors, concepts, wanted).tolist() == pytest.approx([(0 - 1) / 2, (0.8 + 0) / 2])
    assert excess.score(images, vectors, concepts, wanted).tolist() == pytest.approx([1.5, 0.6])
    documents = {
        kind: values(measure(kind(ENCODER, references), made)) for kind in (FloorResemblance, ExcessResemblance)
    }
    maxima = values(measure(MaximumResemblance(ENCODER, references), made))
    for category, maximum in maxima.items():
        assert sum(document[category] for document in documents.values()) == pytest.approx(maximum)
    assert documents[ExcessResemblance]["cat"] > documents[ExcessResemblance]["robot"], "half of these are stars"
    for concept in ("cat", "star"):
        shutil.rmtree(references / concept)
    with pytest.raises(ValueError, match="at least 2 concepts"):
        measure(FloorResemblance(ENCODER, references), made)


def test_detection_at_a_calibrated_threshold(made, references, held_out):
    def metric(rate=0.05):
        return DetectionRate(ENCODER, references, held_out, false_positive_rate=rate)

    document = measure(metric(0.025), made)
    assert values(document) == {"cat": 1, "robot": 1, "house": 0} and document["value"] == pytest.approx(2 / 3)
    details = document["details"]
    assert (details["true_positive_rate"], details["n_positive"], details["n_negative"]) == (1, 4, 39)
    assert document["settings"]["false_positive_rate"] == 0.025
    # the threshold is one of the negatives, which is not above itself
    assert values(measure(metric(0.025), held_out))["other"] == 0
    assert values(measure(metric(), held_out))["other"] == pytest.approx(1 / 39)
    with pytest.raises(ValueError, match="at least 99 negatives"):
        measure(metric(0.01), made)
    document = measure(metric(), made)
    assert is_current(document, metric(), made)
    picture(held_out / "other" / "00.png", None, 1)
    assert not is_current(document, metric(), made), "other held-out images"
    document = measure(metric(), made)
    picture(references / "cat" / "2.png", "cat", 1)
    assert not is_current(document, metric(), made), "other references"
    shutil.copy(references / "cat" / "0.png", held_out / "cat" / "copy.png")
    for ask in (metric().prepare, lambda: measure(metric(), made)):
        with pytest.raises(ValueError, match=r"got 1 that are in both folders: cat/copy\.png is cat/0\.png"):
            ask()


def test_everything_is_embedded_once(made, references, held_out, tmp_path):
    encoder, embedded = PixelEncoder(4), []
    embed = encoder.embed_images
    encoder.embed_images = lambda images: embedded.extend(images) or embed(images)
    cache = EmbeddingCache(tmp_path / "cache")
    kinds = (MaximumResemblance, MeanResemblance, AnyResemblance, Identification)
    for metric in [*(kind(encoder, references) for kind in kinds), DetectionRate(encoder, references, held_out)]:
        measure(metric, ImageSet.open(made, cache))
    assert len(embedded) == 12 + 6 + 43


def test_wrong_folders(made, references, tmp_path):
    absent = tmp_path / "absent"
    for metric in (MaximumResemblance(ENCODER, absent), DetectionRate(ENCODER, references, absent)):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            metric.prepare()
    houses = [ManifestRow(f"house/{i}.png", "house", "a house", "house", 0, i, i) for i in range(4)]
    with pytest.raises(ValueError, match=r"assets \['cat', 'robot', 'star'\].*got the categories \['house'\]"):
        Identification(ENCODER, references).per_group(ImageSet(made, houses))
