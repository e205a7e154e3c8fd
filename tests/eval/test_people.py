"""The classifiers of people on images of two colours, by hand."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from eval.encoders import PixelEncoder
from eval.people import BINS, SIDE, TONES, Genders, SkinTones, colour_bins, log_likelihoods


def test_a_colour_is_binned_by_its_mean_at_a_position():
    image = torch.zeros(3, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)
    image[:, :, SIDE:] = torch.tensor([255, 128, 15], dtype=torch.uint8)[:, None, None]
    image[0, 0, 0] = 255  # one of four pixels, whose mean is in the fourth bin
    bins = colour_bins(image)
    assert bins.shape == (SIDE, SIDE) and bins[0, 0] == 3 * BINS**2 and bins[5, 0] == 0
    assert bins[3, -1] == 15 * BINS**2 + 8 * BINS
    with pytest.raises(ValueError, match="expected uint8 images"):
        colour_bins(image.float())


def test_the_likelihood_is_that_of_a_mixture_at_every_position():
    bins, place = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0.5, 0.5], [0.0, 0.25]])
    skin, rest = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), torch.tensor([0.2, 0.2, 0.6])
    expected = []
    for tone in skin:
        mixture = [
            place[i, j] * tone[bins[i, j]] + (1 - place[i, j]) * rest[bins[i, j]] for i, j in product((0, 1), (0, 1))
        ]
        expected.append(sum(map(math.log, mixture)))
    likelihoods = log_likelihoods(bins, place, skin, rest)
    assert likelihoods.tolist() == pytest.approx([value - sum(expected) / 2 for value in expected], abs=1e-6)


def test_a_tone_is_found_whatever_surrounds_it(tmp_path):
    """The classifier knows a grey for each tone, whose level is 40 times the number of the tone."""
    skin = torch.full((len(TONES), BINS**3), 1e-4)
    images = torch.randint(256, (len(TONES), 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    for tone in range(len(TONES)):
        skin[tone, (40 * tone) * BINS // 256 * (BINS**2 + BINS + 1)] = 1
        images[tone, :, 16:48, 16:48] = 40 * tone
    histograms = {"place": torch.full((SIDE, SIDE), 0.5), "skin": skin, "rest": torch.full((BINS**3,), 1e-4)}
    save_file(histograms, tmp_path / "tones.safetensors")
    tones = SkinTones(tmp_path / "tones.safetensors")
    similarities = tones.embed_images(list(images)) @ tones.embed_texts(TONES).T
    assert similarities.argmax(dim=1).tolist() == list(range(len(TONES)))
    with pytest.raises(ValueError, match=r"labels among no skin tone.*got olive; give one"):
        tones.embed_texts(["olive"])
    with pytest.raises(FileNotFoundError, match=r"got none at .*none.safetensors; make it with python -m training"):
        SkinTones(tmp_path / "none.safetensors").prepare()


def test_a_probe_is_the_odds_of_its_encoders_features(tmp_path):
    encoders, file = [PixelEncoder(1), PixelEncoder(2)], tmp_path / "genders.safetensors"
    weight = torch.randn(4 + 13, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight, "bias": torch.tensor(0.25)}, file)
    genders = Genders(file, encoders)
    genders.prepare()
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    odds = torch.cat([encoder.embed_images([image])[0] for encoder in encoders]) @ weight + 0.25
    assert genders.embed_images([image])[0].tolist() == pytest.approx([-odds.item(), odds.item()])
    assert genders.embed_texts(["man", "girl", "boy"]).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert genders.id != Genders(file, encoders[::-1]).id
