"""The images of a folder in groups, embedded at most once."""

import torch

from eval.encoders import PixelEncoder
from eval.images import read_manifest
from eval.imageset import EmbeddingCache, ImageSet


def test_image_set(make_run, tmp_path):
    run = make_run()
    images = ImageSet(run, read_manifest(run)[::-1], EmbeddingCache(tmp_path / "cache"))
    assert [row.path for row in images.rows] == sorted(row.path for row in images.rows)
    assert images.groups == {
        "bird/000000": [0, 1, 2, 3],
        "bird/000001": [4, 5, 6, 7],
        "fish/000000": [8, 9, 10, 11],
        "fish/000001": [12, 13, 14, 15],
    }
    assert images.texts == ["a photo of a bird"] * 8 + ["a photo of a fish"] * 8
    encoder = PixelEncoder()
    assert images.embeddings(encoder).shape == (16, 3 * 64 + 1)
    pointers = [images.embeddings(of).data_ptr() for of in (encoder, PixelEncoder())]
    assert pointers[0] == pointers[1], "embedded twice"


def test_texts_are_embedded_once_each(make_run, scripted):
    class Counting(scripted):
        asked = 0

        def embed_texts(self, texts):
            self.asked += len(texts)
            return super().embed_texts(texts)

    encoder = Counting([], {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]})
    images = ImageSet.open(make_run())
    assert torch.equal(images.text_embeddings(encoder), torch.eye(2).repeat_interleave(8, dim=0))
    images.text_embeddings(encoder)
    assert encoder.asked == 2
