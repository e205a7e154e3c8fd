"""The encoder that needs no weights."""

import pytest
import torch

from eval.encoders import PixelEncoder


def test_pixels_have_no_texts():
    with pytest.raises(TypeError, match="text tower"):
        PixelEncoder().embed_texts(["a"])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        PixelEncoder(0)


def test_pixels_are_averages():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :, 2:] = 255
    expected = torch.tensor([0, 1, 0, 1] * 3 + [1.0])
    torch.testing.assert_close(PixelEncoder(2).embed_images([image])[0], expected / expected.norm())
