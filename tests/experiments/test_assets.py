"""Protected assets: which folders are read, which are refused and why, and which asset a prompt or a preview finds."""

import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from stand_ins import Colours

from eval.images import load_image
from experiments import PROJECT
from experiments.methods.assets import Retriever, check_disjoint, read_assets
from experiments.prompts import Group, PromptSet

GROUP = Group("p", "a red thing", "red", 0, 2)


def paint(file, colour, size=(12, 8), mode="RGB"):
    """Save an image of one colour, `size` = (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(file)
    return file


@pytest.fixture
def folder(tmp_path):
    """Two assets: red, with a mask for the first of its pictures, and green."""
    paint(tmp_path / "assets" / "red" / "1.png", (255, 0, 0))
    paint(tmp_path / "assets" / "red" / "2.png", (200, 0, 0))
    paint(tmp_path / "assets" / "green" / "1.png", (0, 255, 0))
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :6] = 255
    Image.fromarray(mask).save(tmp_path / "assets" / "red" / "1.mask.png")
    return tmp_path / "assets"


def retriever(folder, prompt=0.9, preview=None, **options):
    return Retriever(folder, Colours(), {"prompt": prompt, "preview": preview}, **options)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_its_masks(folder):
    assets = read_assets(folder)
    assert [asset.label for asset in assets] == ["green/1.png", "red/1.png", "red/2.png"]
    assert [asset.name for asset in assets] == ["green", "red", "red"]
    assert [asset.mask_file and asset.mask_file.name for asset in assets] == [None, "1.mask.png", None]
    assert assets[0].mask is None
    assert assets[1].image.shape == (3, 8, 12) and assets[1].image[:, 0, 0].tolist() == [255, 0, 0]
    assert torch.equal(assets[1].mask, (torch.arange(12) < 6).expand(8, 12))


def test_pictures_that_differ_in_their_suffix_share_a_mask(folder):
    paint(folder / "red" / "1.jpg", (250, 0, 0))
    masked = [asset.file.name for asset in read_assets(folder) if asset.mask is not None]
    assert masked == ["1.jpg", "1.png"]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.copyright\.guidance=FOLDER.*model\.copyright\.scoring=FOLDER"):
        read_assets(None)
    with pytest.raises(FileNotFoundError, match=r"absent.*does not exist"):
        read_assets(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="one subfolder of images"):
        read_assets(tmp_path / "empty")
    paint(tmp_path / "half" / "red" / "1.png", (255, 0, 0))
    (tmp_path / "half" / "green").mkdir()
    with pytest.raises(ValueError, match=r"got none in 'green'"):
        read_assets(tmp_path / "half")


def _animate(file):
    first, second = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue"))
    first.save(file, save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:40]), r"damaged or foreign file.*red/2\.png"),
        (lambda file: paint(file.with_suffix(".jpg"), (9, 9, 9), mode="CMYK"), r"mode CMYK in .*red/2\.jpg; convert"),
        (_animate, r"an animation of 2 frames: .*red/2\.png"),
        (lambda file: _animate(file.with_suffix(".webp")), r"an animation of 2 frames: .*red/2\.webp"),
        (lambda file: paint(file.with_suffix(".gif"), (9, 9, 9)), r"2\.gif; convert them to PNG"),
    ],
)
def test_pictures_that_cannot_be_read_are_named(folder, spoil, message):
    """When the folder is read, with or without a mask: not hours later, when the first prompt finds the picture."""
    spoil(folder / "red" / "2.png")
    with pytest.raises(ValueError, match=message):
        read_assets(folder)


def test_bad_masks_are_named(folder):
    mask = folder / "red" / "1.mask.png"
    paint(mask, (255, 255, 255), size=(8, 12))
    with pytest.raises(ValueError, match=r"1\.mask\.png is a mask of \(12, 8\) pixels for a picture of \(8, 12\)"):
        read_assets(folder)
    paint(mask, (0, 0, 0))
    with pytest.raises(ValueError, match=r"1\.mask\.png is an empty mask"):
        read_assets(folder)
    mask.rename(folder / "red" / "3.mask.png")
    with pytest.raises(ValueError, match=r"Masks without a picture: .*3\.mask\.png.*PICTURE\.mask\.png"):
        read_assets(folder)


def test_a_picture_that_is_scored_against_is_refused_whatever_its_file_format(folder, tmp_path):
    scoring = tmp_path / "scoring"
    paint(scoring / "red" / "other.png", (255, 0, 1))
    check_disjoint(read_assets(folder), scoring)
    assert retriever(folder, scoring=scoring).assets
    paint(scoring / "red" / "same.bmp", (200, 0, 0))
    assert (scoring / "red" / "same.bmp").read_bytes() != (folder / "red" / "2.png").read_bytes()
    with pytest.raises(ValueError, match=r"1 of the pictures .* also scored against: .*red/2\.png = .*same\.bmp"):
        retriever(folder, scoring=scoring)
    # The same bytes in another shape are another picture.
    paint(scoring / "red" / "same.bmp", (200, 0, 0), size=(8, 12))
    check_disjoint(read_assets(folder), scoring)


COPIES = {
    "the same": lambda image: image,
    "half as large": lambda image: image.resize((64, 64)),
    "enlarged": lambda image: image.resize((300, 300)),
    "mirrored": ImageOps.mirror,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.5),
    "turned": lambda image: image.rotate(3, fillcolor="white"),
    "noisy": lambda image: Image.blend(image, Image.effect_noise((128, 128), 60).convert("RGB"), 0.1),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_picture_that_is_scored_against_is_refused(copy, tmp_path):
    protected = PROJECT / "models" / "mini-protected"
    (tmp_path / "scoring" / "panda").mkdir(parents=True)
    for file in (protected / "guidance" / "panda").glob("*.png"):
        if not file.stem.endswith(".mask"):
            break
    with Image.open(file) as image:
        COPIES[copy](image.convert("RGB")).save(tmp_path / "scoring" / "panda" / "other.jpg", quality=40)
    with pytest.raises(ValueError, match=rf"1 of the pictures .*also scored against: {file} = .*other\.jpg"):
        check_disjoint(read_assets(protected / "guidance"), tmp_path / "scoring")


def test_pictures_are_looked_for_copies_one_at_a_time(monkeypatch):
    """Folders of full-size pictures do not fit into memory."""
    protected, seen = PROJECT / "models" / "mini-protected", []
    given = read_assets(protected / "guidance")

    def load(file):
        assert sum(picture() is not None for picture in seen) <= 1
        image = load_image(file)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr("experiments.methods.assets.load_image", load)
    check_disjoint(given, protected / "scoring")
    assert len(seen) > len(given)


def test_drawings_of_one_thing_by_several_artists_are_no_copies():
    protected = PROJECT / "models" / "mini-protected"
    check_disjoint(read_assets(protected / "guidance"), protected / "scoring")
    check_disjoint(read_assets(protected / "guidance"), protected / "held_out")


# --- finding ----------------------------------------------------------------------------------------------------------


def test_the_planted_asset_is_found_by_the_prompt_the_nearest_picture_first(folder):
    found = retriever(folder).find(None, GROUP, {})
    assert [asset.label for asset, _ in found] == ["red/1.png", "red/2.png"]
    scores = [score for _, score in found]
    index, query = Colours().embed_images([asset.image for asset, _ in found]), Colours().embed_texts([GROUP.prompt])
    assert scores == pytest.approx((index @ query[0]).tolist()) and scores == sorted(scores, reverse=True)
    # All pictures of the nearest asset, also one that alone would not be near enough; none of another.
    paint(folder / "red" / "3.png", (90, 90, 255))
    assert [asset.label for asset, _ in retriever(folder).find(None, GROUP, {})] == [
        "red/1.png", "red/2.png", "red/3.png",
    ]  # fmt: skip


def test_nothing_above_the_threshold_is_nothing_found(folder):
    grey = Group("p", "a thing", "red", 0, 2)
    assert retriever(folder).find(None, grey, {}) == []
    best = max(score for _, score in retriever(folder, prompt=-1.0).find(None, grey, {}))
    assert retriever(folder, prompt=best).find(None, grey, {}) == [], "the threshold itself is not above it"
    assert retriever(folder, prompt=best - 1e-6).find(None, grey, {})


class Pipe:
    """Paints what it is told, whatever the prompt, and remembers how it was called."""

    def __init__(self, colour):
        self.colour = colour
        self.calls = []

    def __call__(self, prompt, **options):
        self.calls.append({"prompt": prompt} | options)
        return SimpleNamespace(images=[Image.new("RGB", (16, 16), self.colour)])


def test_the_planted_asset_is_found_by_the_preview(folder):
    call = {"num_inference_steps": 50, "guidance_scale": 3.0}
    grey, pipe = Group("p", "a thing", "red", 0, 2), Pipe((0, 240, 0))
    found = retriever(folder, None, 0.9, preview_steps=3).find(pipe, grey, call)
    assert [asset.label for asset, _ in found] == ["green/1.png"]
    (made,) = pipe.calls
    assert (made["prompt"], made["num_inference_steps"], made["guidance_scale"]) == ("a thing", 3, 3.0)
    # From the noise of the group's first image.
    assert made["generator"].initial_seed() == grey.image_seeds()[0]
    assert call == {"num_inference_steps": 50, "guidance_scale": 3.0}
    assert retriever(folder, None, 0.9).find(Pipe((128, 128, 128)), grey, call) == []


def test_the_preview_is_made_only_where_the_prompt_finds_nothing(folder):
    both, pipe = retriever(folder, 0.9, 0.9), Pipe((0, 255, 0))
    assert both.find(pipe, GROUP, {})[0][0].name == "red" and not pipe.calls
    assert both.find(pipe, Group("p", "a thing", "red", 0, 2), {})[0][0].name == "green" and len(pipe.calls) == 1


class GroupResult(Colours):
    """Texts as directions drawn by their hash: exchangeable, as ordinary prompts are thought to be."""

    def embed_texts(self, texts):
        return torch.nn.functional.normalize(
            torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(int(t.split()[-1]))) for t in texts])
        )


def test_the_automatic_threshold_keeps_its_promise_on_further_ordinary_prompts(folder):
    """Over many calibrations, a further ordinary prompt finds an asset as often as was asked for, and not less."""
    rates = []
    for draw in range(40):
        numbers = [str(1000 * draw + number) for number in range(39)]
        ordinary = PromptSet("o", "development", numbers, ["a"], [0], 2)
        found = Retriever(folder, GroupResult(), {"prompt": "auto"}, ordinary, 0.2)
        further = [f"a {10**6 + 100 * draw + number}" for number in range(100)]
        nearest = (GroupResult().embed_texts(further) @ found._index.T).amax(dim=1)
        rates.append((nearest > found.thresholds["prompt"]).double().mean().item())
    assert np.mean(rates) == pytest.approx(0.2, abs=4 * np.std(rates) / 40**0.5)


def test_the_automatic_threshold_needs_prompts_enough(folder):
    few = PromptSet("o", "development", ["1", "2"], ["a"], [0], 2)
    with pytest.raises(ValueError, match="at least 19 negatives"):
        _ = Retriever(folder, GroupResult(), {"prompt": "auto"}, few).thresholds
    with pytest.raises(ValueError, match=r"retriever\.ordinary"):
        retriever(folder, "auto")


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({}, "at least one of"),
        ({"prompt": None, "preview": None}, "at least one of"),
        ({"prmopt": 0.5}, "at least one of"),
        ({"prompt": 1.5}, r"prompt must be a cosine in \[-1, 1\], got 1.5"),
        ({"prompt": "often"}, r"prompt must be a cosine in \[-1, 1\], got 'often'"),
        ({"preview": "auto"}, r"preview must be a cosine in \[-1, 1\], got 'auto'"),
        ({"preview": float("nan")}, r"preview must be a cosine"),
    ],
)
def test_bad_thresholds_are_refused(folder, thresholds, message):
    with pytest.raises(ValueError, match=message):
        Retriever(folder, Colours(), thresholds)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_settings_follow_content_and_not_location(folder, tmp_path):
    first = retriever(folder).settings()
    assert first["encoder"] == "colours-1" and first["thresholds"] == {"prompt": 0.9}
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert retriever(tmp_path / "elsewhere").settings() == first

    changes = {
        "picture": lambda copy: paint(copy / "red" / "2.png", (199, 0, 0)),
        "mask": lambda copy: paint(copy / "red" / "1.mask.png", (255, 255, 255)),
        "no mask": lambda copy: (copy / "red" / "1.mask.png").unlink(),
        "another": lambda copy: paint(copy / "red" / "3.png", (9, 0, 0)),
        "renamed": lambda copy: (copy / "red").rename(copy / "crimson"),
    }
    hashes = {first["assets_sha256"]}
    for name, change in changes.items():
        change(shutil.copytree(folder, tmp_path / name))
        hashes.add(retriever(tmp_path / name).settings()["assets_sha256"])
    assert len(hashes) == len(changes) + 1


def test_settings_say_what_decides_the_choice(folder):
    assert "preview_steps" not in retriever(folder, preview_steps=3).settings()
    assert retriever(folder, 0.9, 0.5, preview_steps=3).settings()["preview_steps"] == 3
    numbers = PromptSet("o", "development", [str(number) for number in range(30)], ["a"], [0], 2)
    automatic = Retriever(folder, GroupResult(), {"prompt": "auto"}, numbers).settings()
    assert automatic["thresholds"]["prompt"] == round(automatic["thresholds"]["prompt"], 4), "what it came out as"
