"""The released scripts' Frechet distance: squashed images, any number of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from eval.encoders import Encoder
from eval.fidelity import FrechetDistance
from eval.imageset import ImageSet
from eval.measure import measure
from eval.released import ReleasedFrechetDistance, ReleasedMeanSimilarity, ReleasedVendi, Stretched, stretched


class Corners(Encoder):
    """The mean colour of each quarter of an image, raw."""

    name = "corners"
    id = "corners"
    normalised = False

    def embed_images(self, images):
        return torch.stack([torch.nn.functional.adaptive_avg_pool2d(i.float(), 2).flatten() for i in images])


def gradient(height, width):
    """Red grows downwards and green to the right, by 1 in 4 pixels."""
    rows, columns = torch.meshgrid(torch.arange(height) // 4, torch.arange(width) // 4, indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (1024, 1024, (0, 255), (96, 159)),  # squeezed in height, the middle quarter of the width
        (1024, 512, (0, 255), (32, 95)),
        (512, 1024, (32, 95), (0, 255)),
        (256, 256, (0, 63), (0, 63)),
    ],
)
def test_the_aspect_is_lost(height, width, rows, columns):
    found = stretched(gradient(height, width)).int()
    assert found.shape == (3, 256, 256)
    for channel, (low, high) in ((found[0], rows), (found[1], columns)):
        assert channel.min().item() == pytest.approx(low, abs=1) and channel.max().item() == pytest.approx(high, abs=1)


def test_small_images_get_black_borders():
    found = stretched(torch.full((3, 64, 64), 200, dtype=torch.uint8))
    assert (found[:, :, 96:160] >= 199).all() and (found[:, :, :96] == 0).all() and (found[:, :, 160:] == 0).all()


def test_an_encoder_of_squashed_images():
    encoder = Stretched(Corners())
    image = gradient(1024, 512)
    torch.testing.assert_close(encoder.embed_images([image]), Corners().embed_images([stretched(image)]))
    assert encoder.id == "corners-stretched256" and not encoder.normalised
    assert encoder.weights() == Corners().weights()


def test_the_distance_is_of_squashed_images_at_any_n(tmp_path):
    def lay_down(folder, first, count):
        for index in range(first, first + count):
            path = tmp_path / folder / "bird" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (4, 6, 3)).repeat(70, 0).repeat(70, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(path)

    lay_down("made", 0, 14)
    lay_down("real", 50, 20)
    document = measure(ReleasedFrechetDistance(Corners(), tmp_path / "real"), tmp_path / "made")
    # enough images for the right code to agree, given the same squashed images
    same = measure(FrechetDistance(Stretched(Corners()), tmp_path / "real"), tmp_path / "made")
    assert document["value"] == pytest.approx(same["value"])
    proper = measure(FrechetDistance(Corners(), tmp_path / "real"), tmp_path / "made")
    assert document["value"] != pytest.approx(proper["value"], rel=0.01)
    assert document["metric"] == "released_frechet_distance"
    assert document["encoder"]["name"] == "corners, images squashed"
    few = ImageSet(tmp_path / "made", ImageSet.open(tmp_path / "made").rows[:3])
    assert ReleasedFrechetDistance(Corners(), tmp_path / "real").results(few)["value"] > 0
    with pytest.raises(ValueError, match="at least 13 images"):
        FrechetDistance(Corners(), tmp_path / "real").results(few)
    lay_down("single", 0, 1)
    with pytest.raises(ValueError, match="one alone has no covariance"):
        measure(ReleasedFrechetDistance(Corners(), tmp_path / "single"), tmp_path / "made")


@pytest.mark.parametrize("n", [2, 4])
def test_the_released_scripts_choices_are_reproduced_from_their_formulas(numbered_run, n, scripted):
    run = numbered_run(categories=("ant", "bird", "cat"), seeds=(0, 1), images=n // 2)
    vectors = [[1, 0, 0, 0]] * n + np.eye(4)[:n].tolist() + np.random.default_rng(0).normal(size=(n, 4)).tolist()
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    kernels = [unit[k : k + n] @ unit[k : k + n].T for k in (0, n, 2 * n)]
    document = measure(ReleasedMeanSimilarity(scripted(vectors)), run)
    found = [group["value"] for group in document["groups"]]
    # the images of all seeds of a prompt make one matrix
    assert [group["group"] for group in document["groups"]] == ["ant/all", "bird/all", "cat/all"]
    assert (document["n_groups"], document["n_images"]) == (3, 3 * n)
    assert found == pytest.approx([kernel.mean() for kernel in kernels], abs=1e-6)
    found = [group["value"] for group in measure(ReleasedVendi(scripted(vectors)), run)["groups"]]
    eigenvalues = [np.linalg.eigvalsh(kernel).clip(1e-300) for kernel in kernels]
    assert found == pytest.approx([np.exp(-(m * np.log(m)).sum()) for m in eigenvalues], abs=1e-5)
    assert found[:2] == pytest.approx([n**-n, 1], abs=1e-4)
