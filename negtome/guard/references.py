"""The reference images of a policy's protected concepts: which files of a folder show which concept.

These layouts are read, also mixed. Case, spaces, `-` and `_` do not matter where a file or folder is named after a
concept.

    FOLDER/NAME/*.png                       a folder for each concept, also with folders in it
    FOLDER/NAME-1.png, FOLDER/NAME-2.jpg    or files that are named after the concept
    FOLDER/guidance/, FOLDER/scoring/       or two folders of these layouts, if you split the images yourself
    FOLDER/held_out/                        optional: images that show none of the concepts
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Suffixes of images that are read, in any case. `eval.images` has the same ones; neither package imports the other.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
#: Suffixes of images that are refused: they may have several pages or more than 8 bits.
FOREIGN_SUFFIXES = (
    ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".ppm", ".tga", ".exr", ".psd", ".svg",
)  # fmt: skip
#: Subfolders with a meaning, unless a concept has that name: what methods are given, what is measured against, others.
GUIDANCE, SCORING, HELD_OUT = "guidance", "scoring", "held_out"
#: Stands before the suffix in the name of a mask, after the name of its image.
MASK = ".mask"


@dataclass(frozen=True)
class References:
    """The images of a folder by protected concept.

    Attributes:
        folder: where they are.
        images: files of each concept of the policy, in natural order; of both subfolders if the folder is split.
        scoring: those of `images` in the subfolder `scoring`; empty unless the folder is split.
        held_out: images that show no concept, each with the name of its kind.
        masks: of an image, the file NAME.mask.png beside it.
        unassigned: names of subfolders and files that belong to no concept.
        foreign: image files of formats that are not read.
    """

    folder: Path
    images: Mapping[str, tuple[Path, ...]]
    scoring: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    held_out: tuple[tuple[str, Path], ...] = ()
    masks: Mapping[Path, Path] = field(default_factory=dict)
    unassigned: tuple[str, ...] = ()
    foreign: tuple[Path, ...] = ()

    @property
    def is_split(self) -> bool:
        """Whether the folder itself says which images methods are given, and which are measured against."""
        return bool(self.scoring)

    @property
    def absent(self) -> list[str]:
        """Names of the concepts without an image."""
        return [name for name, files in self.images.items() if not files]


def read_references(folder: str | Path, concepts: Iterable[str]) -> References:
    """Find the images of protected concepts in a folder; see the module for the layouts. No image is decoded.

    Args:
        folder: of the images.
        concepts: names of the concepts.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has only one of the subfolders `guidance` and `scoring`.
    """
    folder, concepts = Path(folder).expanduser(), list(concepts)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of reference images, got {folder}, which is none: check the path")
    taken = {_key(name) for name in concepts}
    special = {path.name: path for path in folder.iterdir() if path.is_dir() and _key(path.name) not in taken}
    sides = [special[name] for name in (GUIDANCE, SCORING) if name in special]
    if len(sides) == 1:
        other = SCORING if sides[0].name == GUIDANCE else GUIDANCE
        raise ValueError(
            f"expected both {GUIDANCE}/ and {SCORING}/ in {folder}, got no {other}/: add it, or put all images into a "
            "folder for each concept, and they are split for you"
        )
    aside = {special[HELD_OUT]} if HELD_OUT in special else set()
    unassigned, foreign, masks = [], [], {}
    images: dict[str, list[Path]] = {name: [] for name in concepts}
    scoring: dict[str, list[Path]] = {name: [] for name in concepts}
    for root in sides or [folder]:
        for path in _visible(root):
            if path in aside:
                continue
            concept = _concept_of(path, concepts)
            files = list(_files(path))
            foreign += [file for file in files if file.suffix.lower() in FOREIGN_SUFFIXES]
            files = [file for file in files if file.suffix.lower() in SUFFIXES]
            if concept is None:
                if path.is_dir() or files:
                    unassigned.append(path.relative_to(folder).as_posix())
                continue
            for file in files:
                if file.stem.endswith(MASK):
                    continue
                images[concept].append(file)
                mask = file.with_name(f"{file.stem}{MASK}.png")
                if mask.is_file():
                    masks[file] = mask
                if root.name == SCORING and sides:
                    scoring[concept].append(file)
    held_out = [(_kind(file, root), file) for root in aside for file in _files(root)]
    return References(
        folder,
        {name: _in_order(files) for name, files in images.items()},
        {name: _in_order(files) for name, files in scoring.items()} if sides else {},
        tuple((kind, file) for kind, file in held_out if file.suffix.lower() in SUFFIXES),
        masks,
        tuple(sorted(unassigned)),
        tuple(foreign),
    )


def digest_of(file: Path) -> str:
    """Return a digest of an image's pixels, equal for copies in other lossless formats.

    Raises:
        ValueError: the image cannot be read; see `negtome.Reference`.
    """
    from negtome.reference import Reference  # loads torch

    (image,) = Reference(file).images
    pixels = image.mul(255).round().byte().numpy()
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def is_folder_name(name: str) -> bool:
    """Tell whether a concept's name can name a folder on every system."""
    return not re.search(r'[\x00-\x1f<>:"/\\|?*]', name) and name == name.strip() and not re.match(r"\.|.*\.$", name)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _concept_of(path: Path, concepts: Iterable[str]) -> str | None:
    """Return the concept that a folder, or a file such as NAME.png, NAME-1.png or NAME side.png, is named after."""
    by_key = {_key(name): name for name in concepts}
    if path.is_dir():
        return by_key.get(_key(path.name))
    key = _key(path.stem.removesuffix(MASK))
    fitting = [other for other in by_key if re.fullmatch(rf"{re.escape(other)}( .*| ?\(?\d+\)?)?", key)]
    return by_key[max(fitting, key=len)] if fitting else None


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the visible files below a folder."""
    if path.is_dir():
        for inner in _visible(path):
            yield from _files(inner)
    elif path.is_file():
        yield path


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _kind(file: Path, root: Path) -> str:
    """Return the name of the subfolder that holds a held-out image, or of the image."""
    parts = file.relative_to(root).parts
    return parts[0] if len(parts) > 1 else file.stem


def _in_order(files: Iterable[Path]) -> tuple[Path, ...]:
    """Sort files by name, with numbers by their value: 2 before 10."""

    def key(file: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", str(file))
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return tuple(sorted(files, key=key))
