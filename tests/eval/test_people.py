"""The classifiers of people: pictures of two colours by hand, and what is refused."""

import math

import pytest
import torch
from safetensors.torch import save_file

from eval.encoders import PixelEncoder
from eval.people import BINS, SIDE, TONES, Genders, SkinTones, colour_bins, log_likelihoods


def test_a_colour_is_binned_by_its_mean_at_a_place():
    image = torch.zeros(3, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)
    image[:, :, SIDE:] = torch.tensor([255, 128, 15], dtype=torch.uint8)[:, None, None]
    image[0, 0, 0] = 255  # of four pixels, whose mean is in the fourth bin
    bins = colour_bins(image)
    assert bins.shape == (SIDE, SIDE) and bins[0, 0] == 3 * BINS**2 and bins[5, 0] == 0
    assert bins[3, -1] == 15 * BINS**2 + 8 * BINS
    with pytest.raises(ValueError, match="expected uint8 images"):
        colour_bins(image.float())


def test_the_likelihood_is_that_of_a_mixture_at_every_place():
    bins = torch.tensor([[0, 1], [2, 2]])
    place = torch.tensor([[0.5, 0.5], [0.0, 0.25]])
    skin, rest = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), torch.tensor([0.2, 0.2, 0.6])
    expected = [
        sum(
            math.log(place[i, j] * tone[bins[i, j]] + (1 - place[i, j]) * rest[bins[i, j]])
            for i in range(2)
            for j in range(2)
        )
        for tone in skin
    ]
    found = log_likelihoods(bins, place, skin, rest)
    assert found.tolist() == pytest.approx([value - sum(expected) / 2 for value in expected], abs=1e-6)


@pytest.fixture
def tones(tmp_path):
    """A classifier that knows the grey of each tone: its level is 40 times its place."""
    skin = torch.full((len(TONES), BINS**3), 1e-4)
    for tone in range(len(TONES)):
        skin[tone, (40 * tone) * BINS // 256 * (BINS**2 + BINS + 1)] = 1
    file = tmp_path / "tones.safetensors"
    save_file({"place": torch.full((SIDE, SIDE), 0.5), "skin": skin, "rest": torch.full((BINS**3,), 1e-4)}, file)
    return SkinTones(file)


def test_a_tone_is_found_whatever_surrounds_it(tones):
    images = []
    for tone in range(len(TONES)):
        images.append(torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(tone)).byte())
        images[-1][:, 16:48, 16:48] = 40 * tone
    features, texts = tones.embed_images(images), tones.embed_texts(TONES)
    assert (features @ texts.T).argmax(dim=1).tolist() == list(range(len(TONES)))
    with pytest.raises(ValueError, match=r"labels among no skin tone.*got olive; give one"):
        tones.embed_texts(["olive"])


def test_a_probe_is_the_odds_of_its_encoders_features(tmp_path):
    encoders = [PixelEncoder(1), PixelEncoder(2)]
    weight = torch.randn(4 + 13, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight, "bias": torch.tensor(0.25)}, tmp_path / "genders.safetensors")
    genders = Genders(tmp_path / "genders.safetensors", encoders)
    genders.prepare()
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    odds = torch.cat([encoder.embed_images([image])[0] for encoder in encoders]) @ weight + 0.25
    assert genders.embed_images([image])[0].tolist() == pytest.approx([-odds.item(), odds.item()])
    assert genders.embed_texts(["man", "girl", "boy"]).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert genders.id != Genders(tmp_path / "genders.safetensors", encoders[::-1]).id


def test_a_missing_classifier_says_how_it_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got none at .*none.safetensors; make it with python -m training"):
        SkinTones(tmp_path / "none.safetensors").prepare()
