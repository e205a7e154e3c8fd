"""The folder format: round trips, plain folders, and every kind of image file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images import UNKNOWN_SEED, ManifestRow, group_rows, load_image, read_manifest, write_manifest
from eval.imageset import ImageSet

ROW = ManifestRow("images/bird/000003/01.png", "bird", 'a "photo" of a bird\n', "bird", 3, 1, 7)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_manifest_round_trip_in_canonical_order(tmp_path):
    rows = [
        replace(ROW, path=f"{group}-{index}.png", group_seed=group, index=index)
        for group in (2, 0, 10)
        for index in (1, 0)
    ]
    path = write_manifest(tmp_path, rows)
    read = read_manifest(tmp_path)
    assert sorted(read, key=str) == sorted(rows, key=str)
    assert [(row.group_seed, row.index) for row in read] == [(0, 0), (0, 1), (2, 0), (2, 1), (10, 0), (10, 1)]
    first = path.read_bytes()
    write_manifest(tmp_path, rows[::-1])
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path], "a temporary file stayed behind"


def test_group_rows():
    rows = [
        replace(ROW, path=f"{group}-{index}.png", group_seed=group, index=index) for group in (4, 0) for index in (1, 0)
    ]
    groups = group_rows(rows)
    assert list(groups) == ["bird/000000", "bird/000004"]
    assert [row.index for row in groups["bird/000004"]] == [0, 1]


@pytest.mark.parametrize("path", ["/etc/passwd", "../01.png", "a\\b.png"])
def test_paths_out_of_the_folder_are_refused(path):
    with pytest.raises(ValueError, match="relative to the run folder with forward slashes"):
        replace(ROW, path=path)


def test_manifest_refuses_images_that_are_there_twice(tmp_path):
    for again in (ROW, replace(ROW, path="other.png")):
        with pytest.raises(ValueError, match="twice"):
            write_manifest(tmp_path, [ROW, again])


@pytest.mark.parametrize("line", ["{", '{"path": "a.png"}', "[]", json.dumps({**ROW.to_dict(), "more": 1})])
def test_damaged_manifest_names_the_line(tmp_path, line):
    path = write_manifest(tmp_path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*manifest\.jsonl"):
        read_manifest(tmp_path)


def test_plain_folder(tmp_path):
    for name in ("a red fish", "zebra"):
        for index in range(2):
            save(tmp_path / name / f"{index}.png", index)
    save(tmp_path / "zebra" / "2.JPG")
    (tmp_path / "zebra" / "2.JPG").rename(tmp_path / "zebra" / "3.jfif")
    save(tmp_path / "zebra" / "2.JPG")
    (tmp_path / "zebra" / "notes.txt").write_text("not an image")
    (tmp_path / "metrics").mkdir()
    (tmp_path / ".hidden").mkdir()
    rows = read_manifest(tmp_path)
    assert [row.path for row in rows] == [
        "a red fish/0.png",
        "a red fish/1.png",
        "zebra/0.png",
        "zebra/1.png",
        "zebra/2.JPG",
        "zebra/3.jfif",
    ]
    assert rows[0] == ManifestRow("a red fish/0.png", "a red fish", "a red fish", "a red fish", 0, 0, UNKNOWN_SEED)
    assert len(group_rows(rows)) == 2


def test_plain_folder_with_prompts(tmp_path):
    for name in ("p0", "p1", "p2"):
        save(tmp_path / name / "0.png")
    prompts = {"p0": "a bird", "p1": {"prompt": "a carp", "category": "fish"}}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    rows = read_manifest(tmp_path)
    assert [(row.prompt, row.category) for row in rows] == [("a bird", "p0"), ("a carp", "fish"), ("p2", "p2")]
    (tmp_path / "prompts.json").write_text(json.dumps({**prompts, "p9": "nothing"}))
    with pytest.raises(ValueError, match="p9"):
        read_manifest(tmp_path)
    for wrong in ('["a"]', '{"p0": 3}', '{"p0": {"text": "a"}}', "{"):
        (tmp_path / "prompts.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"prompts\.json"):
            read_manifest(tmp_path)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one subfolder of images"):
        read_manifest(tmp_path)
    save(tmp_path / "images" / "bird" / "000000" / "00.png")
    with pytest.raises(ValueError, match="finish the run"):
        read_manifest(tmp_path)


def test_load_image_modes(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    loaded = load_image(tmp_path / "rgb.png")
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, torch.from_numpy(rgb).permute(2, 0, 1))

    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(load_image(tmp_path / "grey.png"), torch.from_numpy(grey).expand(3, 5, 7))

    Image.fromarray(grey > 128).save(tmp_path / "bit.png")
    assert set(load_image(tmp_path / "bit.png").unique().tolist()) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    colour = np.full((1, 3, 3), 100, dtype=np.uint8)
    image = Image.fromarray(np.dstack([colour, alpha]))
    if mode == "P":
        indexed = Image.new("P", (2, 1))
        indexed.putpalette([100, 100, 100, 0, 0, 0])
        indexed.putdata([1, 0])
        indexed.save(tmp_path / "image.png", transparency=1)
        assert load_image(tmp_path / "image.png")[:, 0].T.tolist() == [[255] * 3, [100] * 3]
        return
    image.convert(mode).save(tmp_path / "image.png")
    transparent, opaque, half = load_image(tmp_path / "image.png")[:, 0].T.tolist()
    assert transparent == [255] * 3
    assert opaque == [100] * 3
    assert half == pytest.approx([177] * 3, abs=1)


def test_orientation_tag_is_applied(tmp_path):
    image = Image.fromarray(np.zeros((4, 9, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 9, 4)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("I;16", "png")])
def test_other_colour_spaces_are_refused(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ValueError, match=rf"mode {mode} in .*image\.{suffix}.*convert"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_animations_are_refused_whatever_their_name(tmp_path, suffix):
    first, *others = (Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 99, 200))
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=others)
    path = (tmp_path / f"moving.{suffix}").rename(tmp_path / "image.webp")
    with pytest.raises(ValueError, match=r"an animation of 3 frames: .*image\.webp"):
        load_image(path)


def test_a_cameras_preview_makes_no_animation(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 0, 0))
    picture.save(tmp_path / "camera.mpo", save_all=True, append_images=[picture.resize((4, 4))])
    path = (tmp_path / "camera.mpo").rename(tmp_path / "camera.jpg")
    assert load_image(path).shape == (3, 16, 16)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "victim.png"
    save(path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "text": b"hello",
            "truncated": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"victim\.png"):
        load_image(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image(tmp_path / "nowhere.png")


def manifest_hash(folder):
    return ImageSet.open(folder).manifest_hash


def test_manifest_hash_follows_the_images(tmp_path, make_run):
    run = make_run(seeds=(0, 1))
    assert manifest_hash(run) == manifest_hash(make_run("copy", seeds=(0, 1)))
    assert manifest_hash(run) != manifest_hash(make_run("fewer", seeds=(0,)))
    before = manifest_hash(run)
    row = read_manifest(run)[3]
    save(run / row.path, seed=99)  # the manifest says what should be there, not what is
    assert manifest_hash(run) != before
    (run / row.path).unlink()
    with pytest.raises(FileNotFoundError, match=row.path):
        manifest_hash(run)
    plain = tmp_path / "plain"
    save(plain / "bird" / "0.png", seed=0)
    before = manifest_hash(plain)
    save(plain / "bird" / "0.png", seed=1)
    assert manifest_hash(plain) != before


def test_images_that_would_be_left_out_are_named(tmp_path):
    plain = tmp_path / "plain"
    for index in range(2):
        save(plain / "bird" / f"{index}.png", index)
    (plain / "bird" / "notes").mkdir()
    (plain / "bird" / "notes" / "readme.txt").write_text("no image")
    assert len(read_manifest(plain)) == 2
    for path, message in (
        ("stray.png", r"1 beside the subfolders bird: stray\.png"),
        ("stray.tif", r"1 beside the subfolders bird: stray\.tif"),
        ("bird/nested/0.png", r"a folder within 'bird': bird/nested/0\.png"),
        ("bird/2.tiff", r"1 of others, the first 2\.tiff; convert"),
        ("bird/2.GIF", r"1 of others, the first 2\.GIF; convert"),
    ):
        save(plain / path)
        with pytest.raises(ValueError, match=message):
            read_manifest(plain)
        (plain / path).unlink()
    assert len(read_manifest(plain)) == 2


@pytest.mark.parametrize("name", ["bird/3.png", "fish"])
def test_links_that_lead_nowhere_are_named(tmp_path, name):
    save(tmp_path / "bird" / "0.png")
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"1 links that lead nowhere: {name.removeprefix('bird/')}"):
        read_manifest(tmp_path)
