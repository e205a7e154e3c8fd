"""Planted assets are found, and a calibrated threshold keeps its promise on new images."""

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
    Identification,
    Likeness,
    MaximumResemblance,
    MeanResemblance,
    calibrate_threshold,
    similarities,
)

ASSETS = ("cat", "robot", "star")


def picture(path, asset, seed, noise=12):
    """Save an image of an asset (a pattern of its own) with noise; of no asset if None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    if asset is None:
        pattern = generator.integers(0, 2, (4, 4, 3)) * 200
    else:
        pattern = np.random.default_rng(1000 + ASSETS.index(asset)).integers(0, 2, (4, 4, 3)) * 200
    pixels = pattern.repeat(4, 0).repeat(4, 1) + generator.integers(0, noise, (16, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def references(tmp_path):
    for number, asset in enumerate(ASSETS):
        for index in range(2):
            picture(tmp_path / "references" / asset / f"{index}.png", asset, 10 * number + index)
    return tmp_path / "references"


@pytest.fixture
def made(tmp_path):
    """Groups of four: all cats; two robots and two stars for the prompt "robot"; none for the prompt "house"."""
    contents = {"cat": ["cat"] * 4, "robot": ["robot", "robot", "star", "star"], "house": [None] * 4}
    for number, (prompt, images) in enumerate(contents.items()):
        for index, asset in enumerate(images):
            picture(tmp_path / "made" / prompt / f"{index}.png", asset, 500 + 10 * number + index)
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


# --- functions -------------------------------------------------------------------------------------------------------


def test_similarities_by_hand():
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    torch.testing.assert_close(
        similarities(embeddings, references), torch.tensor([[0.6, 0.8, -0.6], [0, 1, 0]]).double()
    )


def test_neither_order_nor_company_matters():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=generator), torch.randn(7, 5, generator=generator)
    expected = similarities(x, y)
    torch.testing.assert_close(similarities(x, y.flip(0)), expected.flip(1))
    torch.testing.assert_close(torch.cat([similarities(row[None], y) for row in x]), expected)
    torch.testing.assert_close(similarities(5 * x, 2 * y), expected)
    own = similarities(x, x)
    assert own.diagonal().tolist() == pytest.approx([1] * 9) and own.max() <= 1


def test_what_is_refused():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="at least one reference"):
        similarities(x, x[:0])
    with pytest.raises(ValueError, match="one encoder"):
        similarities(x, x[:, :2])
    with pytest.raises(ValueError, match="not zero"):
        similarities(x, 0 * x)
    with pytest.raises(ValueError, match="finite"):
        similarities(x * math.nan, x)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    negative = torch.arange(1, 20).double() / 100  # 19 of them: 5 % of 20 is one image
    assert calibrate_threshold(negative, 0.05) == pytest.approx(0.19)
    assert calibrate_threshold(negative.flip(0), 0.1) == pytest.approx(0.18)


@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("n", [19, 100])
def test_new_negatives_are_detected_at_the_stated_rate(rate, n):
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(1500):
        found = calibrate_threshold(torch.randn(n, generator=generator), rate)
        # the chance that a new standard normal number is above the threshold, exactly
        rates.append(0.5 * math.erfc(found / math.sqrt(2)))
    margin = 4 * np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) < rate + margin
    assert np.mean(rates) > rate - 1 / (n + 1) - margin  # no more careful than the number of negatives asks for


def test_too_few_negatives_are_refused():
    assert calibrate_threshold(torch.rand(19), 0.05)
    with pytest.raises(ValueError, match=r"at least 19 negatives .* got 18"):
        calibrate_threshold(torch.rand(18), 0.05)
    with pytest.raises(ValueError, match=r"at least 99 negatives"):
        calibrate_threshold([], 0.01)
    for rate in (0, 1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            calibrate_threshold(torch.rand(50), rate)
    with pytest.raises(ValueError, match="finite"):
        calibrate_threshold([math.nan, *range(50)])


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_the_planted_assets_are_found(made, references):
    encoder = PixelEncoder(4)
    nearest = values(measure(Identification(encoder, references), made))
    assert nearest == {"cat": 1, "robot": 0.5}  # a house is no asset
    details = measure(Identification(encoder, references), made)["details"]
    assert details["categories_left_out"] == ["house"]
    assert sum(details["nearest"].values()) == 12 and details["nearest"]["robot"] >= 2
    assert (details["n_assets"], details["n_references"], details["references"]) == (3, 6, "references")
    of_any = values(measure(AnyResemblance(encoder, references), made))
    assert min(of_any["cat"], of_any["robot"]) > 0.99 > of_any["house"]


def test_another_asset_than_the_one_asked_for_is_no_resemblance_to_it(made, references):
    """Two of the four images for "robot" are stars: any reference's cosine is 1 for them, a robot's is not."""
    maxima = values(measure(MaximumResemblance(PixelEncoder(4), references), made))
    assert maxima.keys() == {"cat", "robot"} and maxima["cat"] > 0.99 > maxima["robot"]
    shutil.rmtree(references / "star")
    without = values(measure(MaximumResemblance(PixelEncoder(4), references), made))
    assert without == pytest.approx(maxima), "other assets change nothing"


@pytest.mark.parametrize(("kind", "of"), [(MaximumResemblance, max), (MeanResemblance, np.mean), (AnyResemblance, max)])
def test_metrics_are_naive_loops_over_the_references(made, references, kind, of):
    encoder = PixelEncoder(4)
    images, pictures = ImageSet.open(made), ImageSet.open(references)
    x, y = (found.embeddings(encoder).double().numpy() for found in (images, pictures))
    expected = {}
    for row, image in zip(images.rows, x, strict=True):
        cosines = [
            image @ other / np.linalg.norm(image) / np.linalg.norm(other)
            for reference, other in zip(pictures.rows, y, strict=True)
            if kind is AnyResemblance or reference.category == row.category
        ]
        if cosines:
            expected.setdefault(row.category, []).append(of(cosines))
    found = measure(kind(encoder, references), images)
    assert values(found) == pytest.approx({category: np.mean(scores) for category, scores in expected.items()})
    assert found["value"] == pytest.approx(np.mean([*expected.values()]))
    left_out = [] if kind is AnyResemblance else ["house"]
    assert found["details"].get("categories_left_out", []) == left_out


def test_likeness_is_the_largest_cosine_with_any_real_image_and_not_below_0(made, references):
    any_of, likeness = (measure(kind(PixelEncoder(4), references), made) for kind in (AnyResemblance, Likeness))
    assert values(likeness) == values(any_of) and likeness["higher_is_better"] and not any_of["higher_is_better"]
    assert Likeness().score(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).tolist() == [0]
    with pytest.raises(TypeError, match=r"`reference` of likeness|`references` of likeness"):
        Likeness(PixelEncoder(4)).prepare()


def test_detection_at_a_calibrated_threshold(made, references, held_out):
    metric = DetectionRate(PixelEncoder(4), references, held_out, false_positive_rate=0.025)
    document = measure(metric, made)
    found = values(document)
    assert found["cat"] == found["robot"] == 1 and found["house"] == 0
    details = document["details"]
    assert (details["true_positive_rate"], details["n_positive"], details["n_negative"]) == (1, 4, 39)
    assert document["settings"]["false_positive_rate"] == 0.025
    assert document["value"] == pytest.approx(2 / 3)
    # the threshold is one of the negatives, which is not above itself
    assert values(measure(metric, held_out))["other"] == 0
    coarser = DetectionRate(PixelEncoder(4), references, held_out, false_positive_rate=0.05)
    assert values(measure(coarser, held_out))["other"] == pytest.approx(1 / 39)
    with pytest.raises(ValueError, match="at least 99 negatives"):
        measure(DetectionRate(PixelEncoder(4), references, held_out, false_positive_rate=0.01), made)


def test_documents_follow_references_and_held_out_images(made, references, held_out):
    def metric():
        return DetectionRate(PixelEncoder(4), references, held_out)

    document = measure(metric(), made)
    assert is_current(document, metric(), made)
    picture(held_out / "other" / "00.png", None, 1)
    assert not is_current(document, metric(), made)
    document = measure(metric(), made)
    picture(references / "cat" / "2.png", "cat", 1)
    assert not is_current(document, metric(), made)


def test_held_out_images_that_are_references_are_refused(made, references, held_out):
    shutil.copy(references / "cat" / "0.png", held_out / "cat" / "copy.png")
    metric = DetectionRate(PixelEncoder(4), references, held_out)
    for ask in (metric.prepare, lambda: measure(metric, made)):
        with pytest.raises(ValueError, match=r"got 1 that are in both folders: cat/copy\.png is cat/0\.png"):
            ask()


def test_everything_is_embedded_once(made, references, held_out, tmp_path):
    encoder = PixelEncoder(4)
    embed, seen = encoder.embed_images, []
    encoder.embed_images = lambda images: seen.extend(images) or embed(images)
    cache = EmbeddingCache(tmp_path / "cache")
    kinds = (MaximumResemblance, MeanResemblance, AnyResemblance, Identification)
    for metric in [*(kind(encoder, references) for kind in kinds), DetectionRate(encoder, references, held_out)]:
        measure(metric, ImageSet.open(made, cache))
    assert len(seen) == 12 + 6 + 43


def test_wrong_folders(made, references, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        MaximumResemblance(PixelEncoder(), tmp_path / "absent").prepare()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DetectionRate(PixelEncoder(), references, tmp_path / "absent").prepare()
    houses = [ManifestRow(f"house/{i}.png", "house", "a house", "house", 0, i, i) for i in range(4)]
    with pytest.raises(ValueError, match=r"assets \['cat', 'robot', 'star'\].*got the categories \['house'\]"):
        Identification(PixelEncoder(), references).per_group(ImageSet(made, houses))
