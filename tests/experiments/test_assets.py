"""Reference images of protected concepts: which folders are read or refused, and which concept a query finds."""

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
from experiments.methods.assets import AssetIndex, Retriever, check_disjoint, read_assets
from experiments.prompts import Group, PromptSet

GROUP = Group("p", "a red thing", "red", 0, 2)
GREY = Group("p", "a thing", "red", 0, 2)
PROTECTED = PROJECT / "models" / "mini-protected"


def paint(file, colour, size=(12, 8), mode="RGB"):
    """Save an image of one colour, `size` = (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(file)
    return file


@pytest.fixture
def folder(tmp_path):
    """Two concepts: red, with a mask for the first of its images, and green."""
    paint(tmp_path / "assets" / "red" / "1.png", (255, 0, 0))
    paint(tmp_path / "assets" / "red" / "2.png", (200, 0, 0))
    paint(tmp_path / "assets" / "green" / "1.png", (0, 255, 0))
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :6] = 255
    Image.fromarray(mask).save(tmp_path / "assets" / "red" / "1.mask.png")
    return tmp_path / "assets"


def retriever(folder, prompt=0.9, preview=None, **options):
    return Retriever(folder, Colours(), {"prompt": prompt, "preview": preview}, **options)


def labels(pairs):
    return [asset.label for asset, _ in pairs]


def test_a_folder_is_read_with_its_masks(folder):
    paint(folder / "red" / "1.jpg", (250, 0, 0))  # another suffix, the same mask
    assets = read_assets(folder)
    assert [asset.label for asset in assets] == ["green/1.png", "red/1.jpg", "red/1.png", "red/2.png"]
    assert [asset.mask_file and asset.mask_file.name for asset in assets] == [None, "1.mask.png", "1.mask.png", None]
    assert assets[0].mask is None and assets[2].name == "red"
    assert assets[2].image.shape == (3, 8, 12) and assets[2].image[:, 0, 0].tolist() == [255, 0, 0]
    assert torch.equal(assets[2].mask, (torch.arange(12) < 6).expand(8, 12))


def animate(file):
    first, second = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue"))
    first.save(file, save_all=True, append_images=[second])


def wrong_mask(**options):
    return lambda folder: paint(folder / "red" / "1.mask.png", **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"does not exist"),
        (lambda folder: shutil.rmtree(folder / "red") or shutil.rmtree(folder / "green"), "one subfolder of images"),
        (lambda folder: (folder / "blue").mkdir(), r"got none in 'blue'"),
        (lambda folder: (folder / "red" / "2.png").write_bytes(b"\x89PNG\r\n"), r"damaged or foreign file.*red/2\.png"),
        (lambda folder: paint(folder / "red" / "2.jpg", (9, 9, 9), mode="CMYK"), r"mode CMYK in .*red/2\.jpg; convert"),
        (lambda folder: animate(folder / "red" / "2.png"), r"an animation of 2 frames: .*red/2\.png"),
        (lambda folder: animate(folder / "red" / "2.webp"), r"an animation of 2 frames: .*red/2\.webp"),
        (lambda folder: paint(folder / "red" / "2.gif", (9, 9, 9)), r"2\.gif; convert them to PNG"),
        (wrong_mask(colour=(255, 255, 255), size=(8, 12)), r"is a mask of \(12, 8\) pixels for a picture of \(8, 12\)"),
        (wrong_mask(colour=(0, 0, 0)), r"1\.mask\.png is an empty mask"),
        (lambda folder: (folder / "red" / "1.png").unlink(), r"Masks without a picture: .*1\.mask\.png.*PICTURE\.mask"),
    ],
)
def test_an_unreadable_file_is_named_when_the_folder_is_read(folder, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_assets(folder)


def test_an_image_that_is_scored_against_is_refused_whatever_its_file_format(folder, tmp_path):
    scoring = tmp_path / "scoring"
    paint(scoring / "red" / "other.png", (255, 0, 1))
    assert retriever(folder, scoring=scoring).assets
    paint(scoring / "red" / "same.bmp", (200, 0, 0))
    assert (scoring / "red" / "same.bmp").read_bytes() != (folder / "red" / "2.png").read_bytes()
    with pytest.raises(ValueError, match=r"1 of the pictures .* also scored against: .*red/2\.png = .*same\.bmp"):
        retriever(folder, scoring=scoring)
    paint(scoring / "red" / "same.bmp", (200, 0, 0), size=(8, 12))  # the same bytes in another shape
    read_assets(folder, scoring)


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


@pytest.fixture(scope="module")
def guidance():
    """Drawings of protected concepts, every fourth of those of models/mini-protected."""
    return read_assets(PROTECTED / "guidance")[::4]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_an_image_that_is_scored_against_is_refused(copy, guidance, tmp_path):
    file = guidance[0].file
    (tmp_path / "concept").mkdir()
    with Image.open(file) as image:
        COPIES[copy](image.convert("RGB")).save(tmp_path / "concept" / "other.jpg", quality=40)
    with pytest.raises(ValueError, match=rf"1 of the pictures .*also scored against: {file} = .*other\.jpg"):
        check_disjoint(guidance, tmp_path)


def test_drawings_by_several_artists_are_no_copies_and_are_loaded_one_at_a_time(guidance, monkeypatch):
    """Folders of full-size images do not fit into memory."""
    seen = []

    def load(file):
        assert sum(picture() is not None for picture in seen) <= 1
        image = load_image(file)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr("experiments.methods.assets.load_image", load)
    check_disjoint(guidance, PROTECTED / "scoring")
    assert len(seen) > len(guidance)


def test_an_index_finds_the_nearest_images_of_the_named_concepts(folder):
    index, encoder = AssetIndex(folder, Colours()), Colours()
    queries = encoder.embed_texts(["green", "red"])
    by_hand = [max(torch.dot(encoder.embed_images([asset.image])[0], query).item() for query in queries)
               for asset in index.assets]  # fmt: skip
    pairs = index.nearest(queries)
    assert {asset.label: score for asset, score in pairs} == pytest.approx(
        dict(zip([asset.label for asset in index.assets], by_hand, strict=True))
    )
    assert [score for _, score in pairs] == pytest.approx(sorted(by_hand, reverse=True))
    assert labels(index.nearest(queries, ["red", "blue"])) == ["red/1.png", "red/2.png"]
    assert index.nearest(queries, ["blue"]) == []


def test_indexes_of_the_same_images_embed_them_once_wherever_they_lie(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.methods.assets._EMBEDDINGS", {})
    embedded = []

    class Counting(Colours):
        def embed_images(self, images):
            embedded.extend(images)
            return super().embed_images(images)

    shutil.copytree(folder, tmp_path / "copy")
    first, second = (AssetIndex(path, Counting()).embeddings for path in (folder, tmp_path / "copy"))
    assert torch.equal(first, second) and len(embedded) == 3
    paint(folder / "red" / "2.png", (9, 9, 200))
    assert not torch.equal(AssetIndex(folder, Counting()).embeddings, first) and len(embedded) == 6


def test_a_prompt_finds_all_images_of_the_nearest_concept(folder):
    paint(folder / "red" / "3.png", (90, 90, 255))  # which alone would not be near enough
    pairs = retriever(folder).find(None, GROUP, {})
    assert labels(pairs) == ["red/1.png", "red/2.png", "red/3.png"] and pairs[2][1] < 0.9
    assert retriever(folder).of_prompt("red", ["green"]) == []


def test_a_score_must_exceed_the_threshold(folder):
    assert retriever(folder).find(None, GREY, {}) == []
    best = max(score for _, score in retriever(folder, prompt=-1.0).find(None, GREY, {}))
    assert retriever(folder, prompt=best).find(None, GREY, {}) == []
    assert retriever(folder, prompt=best - 1e-6).find(None, GREY, {})


class Pipe:
    """Paints one colour, whatever the prompt, and remembers how it was called."""

    def __init__(self, colour):
        self.colour, self.calls = colour, []

    def __call__(self, prompt, **options):
        self.calls.append({"prompt": prompt} | options)
        return SimpleNamespace(images=[Image.new("RGB", (16, 16), self.colour)])


def test_a_preview_finds_what_the_prompt_does_not(folder):
    call, pipe = {"num_inference_steps": 50, "guidance_scale": 3.0}, Pipe((0, 240, 0))
    both = retriever(folder, 0.9, 0.9, preview_steps=3)
    assert labels(both.find(pipe, GROUP, call)) == ["red/1.png", "red/2.png"] and not pipe.calls
    assert labels(both.find(pipe, GREY, call)) == ["green/1.png"]
    (made,) = pipe.calls
    assert (made["prompt"], made["num_inference_steps"], made["guidance_scale"]) == ("a thing", 3, 3.0)
    assert made["generator"].initial_seed() == GREY.image_seeds()[0] and call["num_inference_steps"] == 50
    assert retriever(folder, None, 0.9).find(Pipe((128, 128, 128)), GREY, call) == []


class RandomTexts(Colours):
    """Texts as directions drawn by their number: exchangeable, as ordinary prompts are assumed to be."""

    def embed_texts(self, texts):
        generators = (torch.Generator().manual_seed(int(text.split()[-1])) for text in texts)
        return torch.nn.functional.normalize(torch.stack([torch.randn(3, generator=one) for one in generators]))


def ordinary(numbers):
    return PromptSet("o", "development", [str(number) for number in numbers], ["a"], [0], 2)


def test_the_automatic_threshold_keeps_its_promise_on_further_ordinary_prompts(folder):
    """Over many calibrations, a further ordinary prompt finds a concept at the configured rate."""
    rates = []
    for draw in range(20):
        prompts = ordinary(range(1000 * draw, 1000 * draw + 39))
        calibrated = Retriever(folder, RandomTexts(), {"prompt": "auto"}, prompts, 0.2)
        further = RandomTexts().embed_texts([f"a {10**6 + 100 * draw + number}" for number in range(100)])
        nearest = (further @ calibrated.index.embeddings.T).amax(dim=1)
        rates.append((nearest > calibrated.thresholds["prompt"]).double().mean().item())
    assert np.mean(rates) == pytest.approx(0.2, abs=4 * np.std(rates) / 20**0.5)


def test_the_automatic_threshold_needs_prompts_enough(folder):
    with pytest.raises(ValueError, match="at least 19 negatives"):
        _ = Retriever(folder, RandomTexts(), {"prompt": "auto"}, ordinary(range(2))).thresholds
    with pytest.raises(ValueError, match=r"retriever\.ordinary"):
        retriever(folder, "auto")


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
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


def test_settings_follow_content_and_not_location(folder, tmp_path):
    first = retriever(folder, preview_steps=3).settings()
    assert (first["encoder"], first["thresholds"]) == ("colours-1", {"prompt": 0.9}) and "preview_steps" not in first
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert retriever(tmp_path / "elsewhere").settings() == first
    assert retriever(folder, 0.9, 0.5, preview_steps=3).settings()["preview_steps"] == 3
    automatic = Retriever(folder, RandomTexts(), {"prompt": "auto"}, ordinary(range(30))).settings()
    assert automatic["thresholds"]["prompt"] == round(automatic["thresholds"]["prompt"], 4)
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
