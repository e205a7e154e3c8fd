"""An averaged encoder does not tell an image from its mirror image, and is otherwise the encoder that it averages."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.averaged import AveragedEncoder, shifted
from eval.diversity import PairwiseDistance
from eval.encoders import PixelEncoder


def picture(seed, height=32, width=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@settings(max_examples=25, deadline=None)
@given(right=st.integers(-40, 40), down=st.integers(-40, 40), seed=st.integers(0, 3))
def test_a_shift_is_padding_and_cropping(right, down, seed):
    image = picture(seed)
    margin = max(abs(right), abs(down), 1)
    padded = F.pad(image[None].float(), (margin,) * 4, mode="replicate")[0].to(torch.uint8)
    top, left = margin - down, margin - right
    assert torch.equal(shifted(image, right, down), padded[:, top : top + 32, left : left + 24])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(0.01, 0.5))
def test_a_mirror_image_has_the_same_embedding(seed, shift):
    encoder, image = AveragedEncoder(PixelEncoder(4), shift), picture(seed)
    one, other = encoder.embed_images([image, image.flip(-1)])
    torch.testing.assert_close(one, other)


def test_mirroring_half_of_a_group_is_no_diversity_and_other_images_are():
    image = picture(0)
    mirrored = torch.stack([image, image.flip(-1), image, image.flip(-1)])
    others = torch.stack([picture(seed) for seed in range(4)])
    one, averaged = PixelEncoder(8), AveragedEncoder(PixelEncoder(8))
    distance = PairwiseDistance().score
    assert distance(one.embed_images(mirrored)) > 1e-4
    assert distance(averaged.embed_images(mirrored)).abs() < 1e-6
    assert distance(averaged.embed_images(others)) > 1e-4


def test_the_embedding_is_the_mean_direction_of_its_views():
    encoder, image = PixelEncoder(4), picture(5, 64, 128)
    moves = [(right, down) for right in (-3, 0, 3) for down in (-3, 0, 3)]
    every = [view for move in moves for view in (shifted(image, *move), shifted(image.flip(-1), *move))]
    expected = F.normalize(torch.stack([encoder.embed_images([view])[0] for view in every]).mean(0), dim=-1)
    torch.testing.assert_close(AveragedEncoder(encoder).embed_images([picture(6), image])[1], expected)


def test_many_images_are_embedded_as_each_alone():
    encoder = AveragedEncoder(PixelEncoder(4))
    images = [picture(seed, 16, 16) for seed in range(70)]
    alone = torch.cat([encoder.embed_images([image]) for image in images])
    torch.testing.assert_close(encoder.embed_images(images), alone)


def test_what_cannot_be_averaged_is_refused_at_once():
    with pytest.raises(ValueError, match="shift must be in"):
        AveragedEncoder(PixelEncoder(4), 0)
    raw = PixelEncoder(4)
    raw.normalised = False
    with pytest.raises(ValueError, match="length 1"):
        AveragedEncoder(raw)
    assert AveragedEncoder(PixelEncoder(4)).id != AveragedEncoder(PixelEncoder(4), 0.1).id != PixelEncoder(4).id
