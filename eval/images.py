"""The format of a folder of images: its manifest, its groups, and how an image is read.

A run folder holds `manifest.jsonl` (one `ManifestRow` per line) and the image files that it names. If groups ended
without images, it also holds `withheld.jsonl` (one `WithheldRow` per line). `read_manifest` reads other folders too.
A group is the set of images that were generated together; (prompt_id, group_seed) identifies it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from eval.files import cached_hash, canonical_json, read_json, read_regular, write_text

MANIFEST = "manifest.jsonl"
WITHHELD = "withheld.jsonl"
PROMPTS = "prompts.json"
METRICS = "metrics"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
# Image formats that are refused: they may hold several pages or more than 8 bits, or not every system decodes them.
FOREIGN_SUFFIXES = (
    ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".ppm", ".tga", ".exr", ".psd", ".svg",
)  # fmt: skip
UNKNOWN_SEED = -1
# Ways in which a group can end without images; see `Withheld`.
STATUSES = ("refused", "escalated", "blocked")


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image of a run.

    Attributes:
        path: the image file, relative to the run folder, with forward slashes.
        prompt_id: name of the prompt, which can name a folder (no slash).
        prompt: the text from which the image was made.
        category: subject of the prompt; entropies are pooled within a category.
        group_seed: number of the group among the groups of this prompt, >= 0.
        index: position of the image in its group, >= 0.
        seed: seed of this image's random generator; `UNKNOWN_SEED` (-1) if it was not recorded.
        references: images from which the method pushed away, each with the score by which it was chosen; None if the
            method takes no references.
        sha256: hash of the generated file, 64 digits; None if it was not recorded.
    """

    path: str
    prompt_id: str
    prompt: str
    category: str
    group_seed: int
    index: int
    seed: int
    references: Mapping[str, float] | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if not path.parts or "\\" in self.path or ".." in path.parts or path.is_absolute():
            raise ValueError(
                f"expected a path relative to the run folder with forward slashes, got {self.path!r}; "
                "give it as in images/bird/000000/00.png"
            )

    @property
    def group_id(self) -> str:
        """Identifier of the image's group: `prompt_id/group_seed`, the seed in six digits."""
        return f"{self.prompt_id}/{self.group_seed:06d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Withheld:
    """Why a group ended without images.

    Attributes:
        status: "refused" (nothing was generated), "escalated" (a person decides) or "blocked" (images were generated,
            but a check of the images withheld them).
        reason: one line for the user who sent the request.
        clauses: ids of the policy's clauses that apply.
    """

    status: str
    reason: str
    clauses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"expected a status among {', '.join(STATUSES)}, got {self.status!r}")
        if not isinstance(self.reason, str) or not self.reason.strip() or len(self.reason.splitlines()) > 1:
            raise ValueError(f"expected the reason in one line, got {self.reason!r}; say why in a sentence")
        if isinstance(self.clauses, str) or not all(isinstance(clause, str) for clause in self.clauses):
            raise ValueError(f"expected a list of ids of clauses, got {self.clauses!r}")
        object.__setattr__(self, "clauses", tuple(self.clauses))

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" + (f" ({', '.join(self.clauses)})" if self.clauses else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class WithheldRow(Withheld):
    """A group of a run that ended without images; for the fields see `ManifestRow` and `Withheld`."""

    prompt_id: str
    prompt: str
    category: str
    group_seed: int

    @property
    def group_id(self) -> str:
        """Identifier of the group; see `ManifestRow.group_id`."""
        return f"{self.prompt_id}/{self.group_seed:06d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values."""
        return asdict(self) | {"clauses": list(self.clauses)}


def scores_path(folder: Path, name: str, encoder: str) -> Path:
    """Return the path of a metric's values; every encoder has its own file."""
    return folder / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '_', encoder)}.json"


def count_withheld(rows: Iterable[Withheld]) -> str:
    """Return a text such as `2 refused, 1 blocked`."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def canonical_order(rows: Iterable[ManifestRow]) -> list[ManifestRow]:
    """Sort images by prompt_id, group_seed and index; raise ValueError if one occurs twice."""
    ordered = sorted(rows, key=lambda row: (row.prompt_id, row.group_seed, row.index))
    for before, row in pairwise(ordered):
        if (before.group_id, before.index) == (row.group_id, row.index):
            raise ValueError(
                f"expected every image once, got index {row.index} of group {row.group_id} twice: {before.path} and "
                f"{row.path}; remove one"
            )
    return ordered


def write_manifest(folder: str | Path, rows: Iterable[ManifestRow]) -> Path:
    """Write `manifest.jsonl` atomically, in canonical order."""
    lines = [canonical_json(row.to_dict()) + "\n" for row in canonical_order(rows)]
    return write_text(Path(folder) / MANIFEST, "".join(lines))


def write_withheld(folder: str | Path, rows: Iterable[WithheldRow]) -> None:
    """Write `withheld.jsonl` atomically, in canonical order; remove the file if there are no rows."""
    path = Path(folder) / WITHHELD
    ordered = sorted(rows, key=lambda row: (row.prompt_id, row.group_seed))
    if ordered:
        write_text(path, "".join(canonical_json(row.to_dict()) + "\n" for row in ordered))
    else:
        path.unlink(missing_ok=True)


def read_withheld(folder: str | Path) -> list[WithheldRow]:
    """Read `withheld.jsonl` in canonical order, if it exists; raise ValueError if it is damaged or repeats a group."""
    path = Path(folder) / WITHHELD
    rows = _read_rows(path, WithheldRow) if path.exists() else []
    if repeated := [group for group, times in Counter(row.group_id for row in rows).items() if times > 1]:
        raise ValueError(f"expected every group once in {path}, got {', '.join(repeated[:10])} repeatedly")
    return sorted(rows, key=lambda row: (row.prompt_id, row.group_seed))


def read_manifest(folder: str | Path, flat: bool = False) -> list[ManifestRow]:
    """Read the rows of a run folder, or of any folder of images, in canonical order.

    In a folder without `manifest.jsonl`, each subfolder is a group, whose name is the prompt, prompt_id and category.
    A file `prompts.json` can name them otherwise: `{"subfolder": "the prompt"}` or
    `{"subfolder": {"prompt": "the prompt", "category": "bird"}}`. Images are numbered by file name, and their seeds are
    `UNKNOWN_SEED`. If `flat`, a folder of images without subfolders is read as one group.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder has no images, or images that would be ignored: next to the subfolders, in nested
            folders, or of an unsupported format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images, got {folder}, which does not exist; check the path")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return canonical_order(_read_subfolders(folder, flat))
    return canonical_order(_read_rows(manifest, ManifestRow))


def _read_rows(path: Path, kind: type[Any]) -> list[Any]:
    rows = []
    for number, line in enumerate(read_regular(path).splitlines(), start=1):
        try:
            rows.append(kind(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"expected one manifest row a line, got line {number} of {path}: {error}; generate the run again"
            ) from error
    return rows


def _read_subfolders(folder: Path, flat: bool) -> list[ManifestRow]:
    texts_by_name = _read_prompts(folder / PROMPTS)
    subfolders = [path for path in _visible(folder) if path.is_dir()]
    loose = [path.name for path in _visible(folder) if _is_image(path)]
    if subfolders and loose:
        raise ValueError(
            f"expected the images of {folder} in its subfolders, got {len(loose)} beside the subfolders "
            f"{', '.join(path.name for path in subfolders[:10])}: {', '.join(loose[:10])}; move them"
        )
    if flat and not subfolders and (images := _images_in(folder)):
        return [
            ManifestRow(image.name, "reference", "", "reference", 0, index, UNKNOWN_SEED)
            for index, image in enumerate(images)
        ]
    rows = []
    for subfolder in subfolders:
        images, name = _images_in(subfolder), subfolder.name
        if not images and name == METRICS:
            continue
        if not images:
            raise ValueError(
                f"expected images ({', '.join(IMAGE_SUFFIXES)}) in every subfolder of {folder}, got none in "
                f"{name!r}; remove it, or, if this is a run folder, finish the run: it has no {MANIFEST}"
            )
        nested = (path for inner in _visible(subfolder) if inner.is_dir() for path in inner.rglob("*"))
        if image := next(filter(_is_image, nested), None):
            raise ValueError(
                f"expected the images of a prompt directly in its subfolder of {folder}, got a folder within "
                f"{name!r}: {image.relative_to(folder).as_posix()}; move its images up, or the folder away"
            )
        texts = {"prompt": name, "category": name} | texts_by_name.pop(name, {})
        rows += [
            ManifestRow(f"{name}/{image.name}", name, texts["prompt"], texts["category"], 0, index, UNKNOWN_SEED)
            for index, image in enumerate(images)
        ]
    if texts_by_name:
        raise ValueError(
            f"expected every name in {folder / PROMPTS} to be a subfolder with images, got {sorted(texts_by_name)}; "
            "correct the names"
        )
    if not rows:
        raise ValueError(
            f"expected {folder} to be a run folder with {MANIFEST}, or to hold one subfolder of images "
            "a prompt, got neither; move the images of each prompt into a subfolder named after it"
        )
    return rows


def _read_prompts(path: Path) -> dict[str, dict[str, str]]:
    document = read_json(path) if path.is_file() else {}
    names = document if isinstance(document, dict) else {"the document": document}
    texts = {name: {"prompt": entry} if isinstance(entry, str) else entry for name, entry in names.items()}
    for name, entry in texts.items():
        valid_keys = isinstance(entry, dict) and entry.keys() <= {"prompt", "category"}
        if not valid_keys or not all(isinstance(text, str) for text in entry.values()):
            raise ValueError(
                f"expected {path} to map subfolders to a prompt or to {{'prompt': ..., 'category': ...}}, "
                f"got {entry!r} for {name!r}; correct it"
            )
    return texts


def _visible(folder: Path) -> list[Path]:
    """List the paths in a folder by name, without hidden ones; raise ValueError for a broken link."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if dangling := [path.name for path in paths if not path.exists()]:
        raise ValueError(
            f"expected files and folders in {folder}, got {len(dangling)} links that lead nowhere: "
            f"{', '.join(dangling[:10])}; remove them, or bring back what they link to"
        )
    return paths


def _images_in(folder: Path) -> list[Path]:
    """List the images directly in a folder by name; raise ValueError for an unsupported format."""
    images = [path for path in _visible(folder) if _is_image(path)]
    if foreign := [path for path in images if path.suffix.lower() in FOREIGN_SUFFIXES]:
        raise ValueError(
            f"expected images of the kinds {', '.join(IMAGE_SUFFIXES)} in {folder}, got {len(foreign)} of others, the "
            f"first {foreign[0].name}; convert them to PNG, or move them away"
        )
    return images


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES + FOREIGN_SUFFIXES


def group_rows(rows: Iterable[ManifestRow]) -> dict[str, list[ManifestRow]]:
    """Return the rows of every group by its id, groups and images in canonical order."""
    return {group: list(members) for group, members in groupby(canonical_order(rows), lambda row: row.group_id)}


def load_image(path: str | Path) -> torch.Tensor:
    """Read an image as 8-bit RGB: uint8 [3, H, W]; see `load_picture`."""
    return torch.from_numpy(np.array(load_picture(path))).permute(2, 0, 1).contiguous()


def blurred(image: Image.Image, blur: float) -> Image.Image:
    """Apply a Gaussian blur whose radius is `blur` times the image's shorter side."""
    return image.filter(ImageFilter.GaussianBlur(blur * min(image.size)))


def load_picture(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, composite transparency on white, and apply a camera's orientation tag.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, an animation, or in an unsupported colour space (CMYK, 16-bit grey, ...).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file; the folder is incomplete")
    try:
        with Image.open(path) as opened:
            opened.load()
            # a camera's MPO is a JPEG that has a preview behind it
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(
            f"expected a readable image, got a damaged or foreign file: {path} ({error}); make it again"
        ) from error
    if frames > 1:
        raise ValueError(f"expected one picture, got an animation of {frames} frames: {path}; export the one you mean")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(
            f"expected an RGB, RGBA, grey or palette image, got mode {image.mode} in {path}; convert it to 8-bit RGB"
        )
    return image.convert("RGB")


def rows_hash(folder: str | Path | None, rows: Iterable[ManifestRow]) -> str:
    """Return a SHA-256 of all images and their rows, whatever their order.

    Args:
        folder: where the images are; None: they are not here, and the rows' `sha256` stands for each.
        rows: their rows.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image differs from the `sha256` of its row.
    """
    digest = hashlib.sha256()
    for row in canonical_order(rows):
        sha256 = row.sha256 if folder is None else _image_hash(Path(folder) / row.path, row)
        digest.update(f"{canonical_json(row.to_dict())}\n{sha256}\n".encode())
    return digest.hexdigest()


def _image_hash(path: Path, row: ManifestRow) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file; generate the run again")
    sha256 = cached_hash(path)
    if row.sha256 not in (None, sha256):
        raise ValueError(
            f"expected the image that was generated, got another file at {path}: it was replaced or is damaged; "
            "run experiments.generate again, which makes its group anew"
        )
    return sha256
