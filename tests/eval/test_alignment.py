"""CLIPScore against its definition."""

import pytest
import torch

from eval.alignment import ClipScore, clip_score
from eval.encoders import PixelEncoder
from eval.metric import measure


def test_closed_forms():
    images = torch.tensor([[3.0, 0], [1, 1], [1, 0], [1, 0]])
    texts = torch.tensor([[2.0, 0], [1, 0], [0, 1], [-1, 0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100, 100 / 2**0.5, 0, 0])


def test_each_image_has_its_own_text():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 5, generator=generator)
    one_by_one = [clip_score(image[None], text[None]).item() for image, text in zip(images, texts, strict=True)]
    assert clip_score(images, texts).tolist() == pytest.approx(one_by_one)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one text"):
        clip_score(torch.ones(3, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="one model"):
        clip_score(torch.ones(3, 4), torch.ones(3, 5))


def test_clip_score_by_hand(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish"), seeds=(0,), images=2)
    texts = {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]}
    document = measure(ClipScore(scripted([[1, 0], [0, 1], [3, 4], [0, 2]], texts)), run)
    assert [group["value"] for group in document["groups"]] == pytest.approx([50, 90])
    assert document["details"] == {"n_prompts": 2, "n_prompts_truncated": 2}
    with pytest.raises(TypeError, match="text tower"):
        measure(ClipScore(PixelEncoder()), run)
