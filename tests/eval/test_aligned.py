"""The aligned distance does not count mirror images and shifts as diversity, and other images still differ."""

import pytest
import torch
import torch.nn.functional as F

from eval.aligned import SHIFTS, AlignedDistance, ShiftsEncoder
from eval.averaged import shifted
from eval.encoders import PixelEncoder


def picture(seed, height=64, width=64):
    """A blot in the middle of a white image, whose shifts by an eighth of the side leave nothing out."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    blot = torch.randint(0, 256, (3, height // 2, width // 2), dtype=torch.uint8, generator=generator)
    image[:, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = blot
    return image


def distance(images, encoder=None):
    metric = AlignedDistance(encoder or PixelEncoder(16))
    metric.update(torch.stack(images)[None])
    return metric.compute().item()


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image.flip(-1),
        lambda image: shifted(image, 3, 0),
        lambda image: shifted(image, -6, 6),
        lambda image: shifted(image, 3, -3).flip(-1),
    ],
)
def test_a_mirrored_or_shifted_copy_is_the_same_image(edit):
    image = picture(0)
    assert distance([image, edit(image), image, edit(image)]) == pytest.approx(0, abs=1e-6)
    # Among other images, too, an edit changes nothing that it did not move out of view.
    group = [picture(seed) for seed in range(4)]
    mirrored = [one if index % 2 else one.flip(-1) for index, one in enumerate(group)]
    assert distance(mirrored) == pytest.approx(distance(group), abs=1e-6)
    assert distance(group) > 1e-4


def test_the_distance_is_the_least_over_all_pairs_of_shifts():
    encoder, images = PixelEncoder(8), [picture(seed, 64, 128) for seed in (1, 2, 3)]
    moves = [(right, down) for right in (-6, -3, 0, 3, 6) for down in (-6, -3, 0, 3, 6)]

    def views(image):
        both = [encoder.embed_images([shifted(image, *move), shifted(image, *move).flip(-1)]) for move in moves]
        return [F.normalize(one.sum(dim=0), dim=0) for one in both]

    expected = [
        min(1 - (one @ other).item() for one in views(images[i]) for other in views(images[j]))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert distance(images, encoder) == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_embeddings_have_length_1_and_do_not_depend_on_the_batch():
    encoder, images = ShiftsEncoder(PixelEncoder(4)), [picture(seed) for seed in range(3)]
    together = encoder.embed_images(images)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    assert together.shape == (3, SHIFTS * PixelEncoder(4).embed_images(images).shape[1])
    torch.testing.assert_close(together[1:2], encoder.embed_images(images[1:2]))


def test_embeddings_of_another_length_are_refused():
    raw = PixelEncoder(4)
    raw.normalised = False
    with pytest.raises(ValueError, match="length 1"):
        AlignedDistance(raw)
    assert ShiftsEncoder(PixelEncoder(4)).id not in (PixelEncoder(4).id, ShiftsEncoder(PixelEncoder(8)).id)
