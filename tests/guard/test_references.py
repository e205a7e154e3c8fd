"""Which files of a folder show which concept."""

import pytest

from eval import images
from negtome.guard.references import FOREIGN_SUFFIXES, SUFFIXES, is_folder_name, read_references

CONCEPTS = ["Finn Drizzle", "fox", "Madame Hoot"]


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names(references, concept):
    return [file.relative_to(references.folder).as_posix() for file in references.images[concept]]


def test_folders_and_files_in_any_spelling_are_read_together(tmp_path):
    write(tmp_path, "finn_drizzle/a.PNG", "finn_drizzle/poses/b.JPG", "Finn-Drizzle 3.webp", "FINN DRIZZLE.jpeg")
    write(tmp_path, "madame-hoot10.png", "madame-hoot2.png", "Madame Hoot (1).png", "fox-side.png", "fox/x.png")
    write(tmp_path, "notes.txt", ".DS_Store", "finn_drizzle/Thumbs.db", "finn_drizzle/.hidden.png")
    references = read_references(tmp_path, CONCEPTS)
    assert sorted(names(references, "Finn Drizzle")) == [
        "FINN DRIZZLE.jpeg", "Finn-Drizzle 3.webp", "finn_drizzle/a.PNG", "finn_drizzle/poses/b.JPG"]  # fmt: skip
    assert names(references, "Madame Hoot")[1:] == ["madame-hoot2.png", "madame-hoot10.png"]
    assert sorted(names(references, "fox")) == ["fox-side.png", "fox/x.png"]
    assert not references.absent and not references.unassigned and not references.foreign and not references.is_split


def test_the_longest_name_counts(tmp_path):
    write(tmp_path, "fox.png", "fox den.png", "foxglove.png")
    references = read_references(tmp_path, ["fox", "fox den"])
    assert names(references, "fox") == ["fox.png"] and names(references, "fox den") == ["fox den.png"]
    assert references.unassigned == ("foxglove.png",)


def test_masks_are_of_their_images(tmp_path):
    write(tmp_path, "fox/1.png", "fox/1.mask.png", "fox/2.png", "fox 3.png", "fox 3.mask.png")
    references = read_references(tmp_path, ["fox"])
    assert sorted(names(references, "fox")) == ["fox 3.png", "fox/1.png", "fox/2.png"]
    assert {image.name: mask.name for image, mask in references.masks.items()} == {
        "1.png": "1.mask.png", "fox 3.png": "fox 3.mask.png"}  # fmt: skip


def test_a_folder_that_is_split_stays_so_and_says_what_is_held_out(tmp_path):
    write(
        tmp_path,
        "guidance/fox/1.png",
        "scoring/fox-2.png",
        "scoring/fox/3.png",
        "held_out/tree/1.png",
        "held_out/2.png",
    )
    references = read_references(tmp_path, ["fox"])
    assert references.is_split and sorted(file.name for file in references.scoring["fox"]) == ["3.png", "fox-2.png"]
    assert len(references.images["fox"]) == 3
    assert sorted(kind for kind, _ in references.held_out) == ["2", "tree"]


def test_half_a_split_is_refused_unless_it_is_a_concept(tmp_path):
    write(tmp_path, "guidance/1.png", "fox/1.png")
    with pytest.raises(ValueError, match="got no scoring/: add it"):
        read_references(tmp_path, ["fox"])
    assert read_references(tmp_path, ["fox", "Guidance"]).absent == []


def test_a_name_that_can_leave_the_folder_names_none():
    assert is_folder_name("Madame Hoot") and is_folder_name("ムーミン")
    assert not any(map(is_folder_name, ("a/b", "..", ".", ".hidden", "a\\b", "c:", " x", "x.", "a\x00b")))


def test_images_that_the_evaluation_reads_or_refuses_are_read_or_refused_here():
    """The two packages do not import each other, so the lists are written twice."""
    assert set(SUFFIXES) == set(images.IMAGE_SUFFIXES)
    assert set(FOREIGN_SUFFIXES) == set(images.FOREIGN_SUFFIXES)
