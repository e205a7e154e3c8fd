"""The format of folders: round trips, folders without a manifest, every kind of image file, and files in one step."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.files import cached_hash, canonical_json, content_hash, write_json
from eval.images import UNKNOWN_SEED, ManifestRow, group_rows, load_image, read_manifest, write_manifest
from eval.imageset import ImageSet

ROW = ManifestRow("images/bird/000003/01.png", "bird", 'a "photo" of a bird\n', "bird", 3, 1, 7)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# --- files -----------------------------------------------------------------------------------------------------------


def test_hashes_are_cached_until_a_file_changes(tmp_path, monkeypatch):
    (tmp_path / "abc").write_bytes(b"abc")
    # the first test vector of FIPS 180-2
    assert content_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    read, image = [], tmp_path / "image.png"
    monkeypatch.setattr("eval.files.content_hash", lambda path: read.append(path) or content_hash(path))
    image.write_bytes(b"pixels")
    digest = content_hash(image)
    # a new file may be written again within the same tick of the clock
    assert cached_hash(image) == cached_hash(image) == digest and len(read) == 2
    monkeypatch.setattr("eval.files.SETTLED", 0)
    assert cached_hash(image) == cached_hash(image) == digest and len(read) == 3
    # other content of the same size and with the same time
    status = os.stat(image)
    image.write_bytes(image.read_bytes()[::-1])
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cached_hash(image) == content_hash(image) != digest


def test_equal_documents_are_equal_text_written_in_one_step(tmp_path, monkeypatch):
    assert canonical_json({"b": [1, 2.0], "a": "é"}) == '{"a": "é", "b": [1, 2.0]}'
    assert canonical_json({"b": [1, 2.0], "a": "é"}, compact=True) == r'{"a":"\u00e9","b":[1,2.0]}'
    path = tmp_path / "deep" / "document.json"
    write_json(path, {"b": 1, "a": "é"})
    content = path.read_bytes()
    assert content.decode() == '{\n "a": "é",\n "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


# --- manifests -------------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_written_in_canonical_order(tmp_path):
    places = [(group, index) for group in (2, 0, 10) for index in (1, 0)]
    rows = [replace(ROW, path=f"{group}-{i}.png", group_seed=group, index=i) for group, i in places]
    path = write_manifest(tmp_path, rows)
    read = read_manifest(tmp_path)
    assert sorted(read, key=str) == sorted(rows, key=str)
    assert [(row.group_seed, row.index) for row in read] == sorted(places)
    groups = group_rows(rows)
    assert list(groups) == ["bird/000000", "bird/000002", "bird/000010"]
    assert [row.index for row in groups["bird/000010"]] == [0, 1]
    content = path.read_bytes()
    write_manifest(tmp_path, rows[::-1])
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/etc/passwd", "../01.png", "a\\b.png"])
def test_paths_out_of_the_folder_are_refused(path):
    with pytest.raises(ValueError, match="relative to the run folder with forward slashes"):
        replace(ROW, path=path)


@pytest.mark.parametrize("line", ["{", '{"path": "a.png"}', "[]", json.dumps({**ROW.to_dict(), "more": 1})])
def test_damaged_and_repeated_rows_are_named(tmp_path, line):
    path = write_manifest(tmp_path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*manifest\.jsonl"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="twice"):
        write_manifest(tmp_path, [ROW, replace(ROW, path="other.png")])


def test_the_manifests_hash_follows_the_images(tmp_path, make_run):
    def hash_of(folder):
        return ImageSet.open(folder).manifest_hash

    run = make_run()
    first = hash_of(run)
    assert first == hash_of(make_run("copy")) != hash_of(make_run("fewer", seeds=(0,)))
    row = read_manifest(run)[3]
    save(run / row.path, seed=99)
    assert hash_of(run) != first
    (run / row.path).unlink()
    with pytest.raises(FileNotFoundError, match=row.path):
        hash_of(run)


# --- folders without a manifest --------------------------------------------------------------------------------------


def test_a_folder_with_a_subfolder_per_prompt(tmp_path):
    for path in ("a red fish/0.png", "a red fish/1.png", "zebra/0.png", "zebra/1.jpg", "zebra/2.JPG"):
        save(tmp_path / path)
    (tmp_path / "zebra" / "1.jpg").rename(tmp_path / "zebra" / "3.jfif")
    (tmp_path / "zebra" / "notes.txt").write_text("not an image")
    for name in ("metrics", ".hidden"):
        (tmp_path / name).mkdir()
    rows = read_manifest(tmp_path)
    names = ["a red fish/0.png", "a red fish/1.png", "zebra/0.png", "zebra/2.JPG", "zebra/3.jfif"]
    assert [row.path for row in rows] == names and len(group_rows(rows)) == 2
    assert rows[0] == ManifestRow("a red fish/0.png", "a red fish", "a red fish", "a red fish", 0, 0, UNKNOWN_SEED)
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"zebra": {"prompt": "a striped horse", "category": "horse"}, "a red fish": "a carp"}))
    texts = {(row.prompt, row.category) for row in read_manifest(tmp_path)}
    assert texts == {("a carp", "a red fish"), ("a striped horse", "horse")}
    for wrong in ('{"p9": "no folder"}', '["a"]', '{"zebra": 3}', '{"zebra": {"text": "a"}}', "{"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"prompts\.json"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("link", ["bird/3.png", "fish"])
def test_images_that_would_be_ignored_are_named(tmp_path, link):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one subfolder of images"):
        read_manifest(tmp_path)
    for index in range(2):
        save(tmp_path / "bird" / f"{index}.png", index)
    (tmp_path / "bird" / "notes").mkdir()
    (tmp_path / "bird" / "notes" / "readme.txt").write_text("no image")
    for path, message in (
        ("stray.png", r"1 beside the subfolders bird: stray\.png"),
        ("stray.tif", r"1 beside the subfolders bird: stray\.tif"),
        ("bird/nested/0.png", r"a folder within 'bird': bird/nested/0\.png"),
        ("bird/2.tiff", r"1 of others, the first 2\.tiff; convert"),
        ("bird/2.GIF", r"1 of others, the first 2\.GIF; convert"),
    ):
        save(tmp_path / path)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)
        (tmp_path / path).unlink()
    assert len(read_manifest(tmp_path)) == 2
    (tmp_path / link).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"1 links that lead nowhere: {link.removeprefix('bird/')}"):
        read_manifest(tmp_path)
    save(tmp_path / "run" / "images" / "000000" / "00.png")
    with pytest.raises(ValueError, match="finish the run"):
        read_manifest(tmp_path / "run")


# --- image files -----------------------------------------------------------------------------------------------------


def test_colour_grey_bits_and_transparency_are_read_as_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    for name, pixels in (("rgb", rgb), ("grey", grey), ("bit", grey > 128)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    loaded = load_image(tmp_path / "rgb.png")
    assert loaded.dtype == torch.uint8 and torch.equal(loaded, torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(load_image(tmp_path / "grey.png"), torch.from_numpy(grey).expand(3, 5, 7))
    assert set(load_image(tmp_path / "bit.png").unique().tolist()) == {0, 255}
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    image = Image.fromarray(np.dstack([np.full((1, 3, 3), 100, dtype=np.uint8), alpha]))
    for mode in ("RGBA", "LA"):
        image.convert(mode).save(tmp_path / "image.png")
        transparent, opaque, half = load_image(tmp_path / "image.png")[:, 0].T.tolist()
        assert (transparent, opaque) == ([255] * 3, [100] * 3) and half == pytest.approx([177] * 3, abs=1)
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([100, 100, 100, 0, 0, 0])
    indexed.putdata([1, 0])
    indexed.save(tmp_path / "indexed.png", transparency=1)
    assert load_image(tmp_path / "indexed.png")[:, 0].T.tolist() == [[255] * 3, [100] * 3]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image(tmp_path / "nowhere.png")


def test_a_cameras_orientation_and_preview(tmp_path):
    image = Image.new("RGB", (9, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 9, 4)
    image.save(tmp_path / "camera.mpo", save_all=True, append_images=[image.resize((4, 4))])
    assert load_image((tmp_path / "camera.mpo").rename(tmp_path / "camera.jpg")).shape == (3, 4, 9)


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_animations_and_other_colour_spaces_are_refused(tmp_path, suffix):
    first, *others = (Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 99, 200))
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=others)
    path = (tmp_path / f"moving.{suffix}").rename(tmp_path / "image.webp")  # whatever its name
    with pytest.raises(ValueError, match=r"an animation of 3 frames: .*image\.webp"):
        load_image(path)
    for mode, name in (("CMYK", "image.jpg"), ("I;16", "image.png")):
        Image.new(mode, (4, 4)).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"mode {mode} in .*{name}.*convert"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "victim.png"
    save(path)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": content[:middle], "flipped": flipped}[damage])
    with pytest.raises(ValueError, match=r"victim\.png"):
        load_image(path)
