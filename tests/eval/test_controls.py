"""Negative controls edit images as stated; the averaged encoder and the realism score judge them as they should."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.io import write_png

from eval.controls import CONTROLS, write_control
from eval.encoders import PixelEncoder
from eval.features import EffNetLite0
from eval.imageset import ImageSet
from eval.metric import measure
from eval.realism import Realism

PROJECT = Path(__file__).parents[2]


def picture(seed=0, height=64, width=96):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_edit_keeps_shape_and_type_and_repeats_itself(name, index):
    image = picture()
    before, edited = image.clone(), CONTROLS[name](image, index, 7)
    assert edited.dtype == torch.uint8 and edited.shape == image.shape
    assert torch.equal(image, before) and torch.equal(CONTROLS[name](image, index, 7), edited)
    unchanged = name in ("mirrored", "shifted") and index % 2 == 0
    assert torch.equal(edited, image) == unchanged


def test_mirroring_twice_changes_nothing_and_a_shift_moves_by_a_sixteenth():
    image = picture()
    assert torch.equal(CONTROLS["mirrored"](CONTROLS["mirrored"](image, 1, 0), 1, 0), image)
    assert torch.equal(CONTROLS["shifted"](image, 1, 0)[:, :, 6:], image[:, :, :-6])


def test_the_blur_is_a_gaussian():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[..., 32, 32] = 255
    expected = gaussian_filter(image[0].double().numpy(), 1.5, truncate=4)
    assert np.abs(expected - CONTROLS["blurred"](image, 0, 0)[0].numpy()).max() < 1


def test_noise_has_a_tenth_of_the_range_and_depends_on_the_seed_alone():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    one, other = (CONTROLS["noisy"](grey, 0, seed).double().flatten() - 128 for seed in (0, 1))
    assert torch.equal(CONTROLS["noisy"](grey, 3, 1).double().flatten() - 128, other)
    assert one.std().item() == pytest.approx(25.5, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05


def test_a_control_of_a_folder_keeps_its_groups_and_edits_every_image(tmp_path):
    for prompt in ("a", "b"):
        (tmp_path / "images" / prompt).mkdir(parents=True)
        for index in range(3):
            write_png(picture(index, 32, 32 + index), str(tmp_path / "images" / prompt / f"{index}.png"))
    images = ImageSet.open(tmp_path / "images")
    control = write_control(images, "mirrored", tmp_path / "control")
    assert control.groups == images.groups and control.texts == images.texts
    for members in images.groups.values():
        for index, position in enumerate(members):
            (before,), (after,) = images.load([position]), control.load([position])
            assert torch.equal(after, before.flip(-1) if index % 2 else before)


def test_realism_is_the_formula_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    real, features = (torch.randn(n, 5, generator=generator).double() for n in (21, 7))
    radii = [np.sort(np.linalg.norm(real - one, axis=1))[3] for one in real]
    dense = [number for number, radius in enumerate(radii) if radius <= np.median(radii)]
    expected = [max(radii[n] / np.linalg.norm(real[n] - one) for n in dense) for one in features]
    assert Realism().score(features, real).numpy() == pytest.approx(expected)


def test_realism_of_early_features_falls_with_blur_and_noise_and_not_with_mirroring(tmp_path):
    """On artwork that is left out of the reference images."""
    artwork = PROJECT / "models" / "mini-reference"
    for category in ("car",):
        shutil.copytree(artwork / category, tmp_path / "real" / category)
        (tmp_path / "made" / category).mkdir(parents=True)
        for path in sorted((tmp_path / "real" / category).iterdir())[::5]:
            path.rename(tmp_path / "made" / category / path.name)
    images = ImageSet.open(tmp_path / "made")
    metric = Realism(EffNetLite0(channels=40), tmp_path / "real")
    value = measure(metric, images)["value"]
    controls = {name: measure(metric, write_control(images, name, tmp_path / name))["value"] for name in CONTROLS}
    assert controls["mirrored"] == pytest.approx(value, rel=0.1) == controls["shifted"]
    assert max(controls["blurred"], controls["noisy"]) < 0.8 * value


def test_too_few_reference_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for seed in range(3):
        write_png(picture(seed, 32, 32), str(tmp_path / "a" / f"{seed}.png"))
    with pytest.raises(ValueError, match="more than 3 reference images"):
        measure(Realism(PixelEncoder(16), tmp_path), ImageSet.open(tmp_path))
