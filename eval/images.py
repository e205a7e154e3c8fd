"""The format of a folder of images: its manifest, its groups, and how one image is read.

A run folder holds `manifest.jsonl` (one `ManifestRow` a line) and the PNG files it names. Any other folder
can be measured as well: one subfolder a prompt, the images of one group in each (see `read_manifest`).

A group is what was generated together, (prompt_id, group_seed); it is the unit of every statistic in this
package.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

MANIFEST = "manifest.jsonl"
PROMPTS = "prompts.json"
METRICS = "metrics"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNKNOWN_SEED = -1


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image of a run.

    Attributes:
        path: the image file, relative to the run folder, with forward slashes.
        prompt_id: name of the prompt, usable as a folder's name (no slash).
        prompt: the text the image was made from.
        category: what the prompt asks for; entropies are pooled within a category.
        group_seed: number of the group among the groups of this prompt, >= 0.
        index: the image's place in its group, >= 0.
        seed: seed of this image's own random generator; `UNKNOWN_SEED` (-1) where nobody knows it.
    """

    path: str
    prompt_id: str
    prompt: str
    category: str
    group_seed: int
    index: int
    seed: int

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if not parts or "\\" in self.path or ".." in parts or PurePosixPath(self.path).is_absolute():
            raise ValueError(
                f"expected a path relative to the run folder with forward slashes, got {self.path!r}; "
                "give it as in images/bird/000000/00.png"
            )
        if not self.prompt_id or "/" in self.prompt_id:
            raise ValueError(f"expected a prompt_id without slashes, got {self.prompt_id!r}; replace them")
        for name in ("group_seed", "index"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"expected {name} to be an integer >= 0, got {number!r}; number from 0")

    @property
    def group_id(self) -> str:
        """Identity of the image's group: `prompt_id/group_seed`, the seed in six digits."""
        return f"{self.prompt_id}/{self.group_seed:06d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ManifestRow:
        """Build a row from JSON values; missing or unknown fields are an error."""
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ValueError(
                f"expected a manifest row with the fields {sorted(expected)}, got {sorted(values)}; "
                "the manifest was written by another version: generate the run again"
            )
        return cls(**values)


def canonical_json(document: Any) -> str:
    """Write JSON in the one form this package uses: sorted keys, real characters, no NaN or infinity."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file so that readers see the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # mkstemp makes the file private; a result should have the permissions of any new file
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, document: Any) -> Path:
    """Write a JSON document atomically: sorted keys, indented, NaN and infinity refused with ValueError."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    return write_text(path, text + "\n")


def canonical_order(rows: Iterable[ManifestRow]) -> list[ManifestRow]:
    """Sort by prompt_id, group_seed, index, and check that the rows make sense together.

    Raises:
        ValueError: a path or a place in a group occurs twice, or a group has two prompts or categories.
    """
    ordered = sorted(rows, key=lambda row: (row.prompt_id, row.group_seed, row.index))
    paths: set[str] = set()
    heads: dict[str, ManifestRow] = {}
    places: set[tuple[str, int]] = set()
    for row in ordered:
        head = heads.setdefault(row.group_id, row)
        if (row.prompt, row.category) != (head.prompt, head.category):
            raise ValueError(
                f"expected one prompt and category in group {row.group_id}, got "
                f"{(head.prompt, head.category)} and {(row.prompt, row.category)}; give each prompt its own prompt_id"
            )
        if row.path in paths or (row.group_id, row.index) in places:
            raise ValueError(
                f"expected every image once, got {row.path} (index {row.index} of group {row.group_id}) "
                "twice; remove the repeated row"
            )
        paths.add(row.path)
        places.add((row.group_id, row.index))
    return ordered


def write_manifest(folder: str | Path, rows: Iterable[ManifestRow]) -> Path:
    """Write `manifest.jsonl` atomically, in canonical order whatever the order of `rows`."""
    lines = [canonical_json(row.to_dict()) + "\n" for row in canonical_order(rows)]
    if not lines:
        raise ValueError(f"expected at least one image for the manifest of {folder}, got none; generate images first")
    return write_text(Path(folder) / MANIFEST, "".join(lines))


def read_manifest(folder: str | Path) -> list[ManifestRow]:
    """Read the images of a run folder, or of any plain folder, in canonical order.

    A plain folder has no `manifest.jsonl`; each of its subfolders is one group and its name is prompt,
    prompt_id and category. A file `prompts.json` in the folder may say otherwise, for some or all subfolders:
    `{"subfolder": "the prompt"}` or `{"subfolder": {"prompt": "the prompt", "category": "bird"}}`.

    Args:
        folder: a run folder or a plain folder.

    Returns:
        The rows; where the folder is plain, images are numbered by file name and seeds are `UNKNOWN_SEED`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds nothing that can be read, with what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images, got {folder}, which does not exist; check the path")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return _read_plain_folder(folder)
    rows = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(ManifestRow.from_dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected one manifest row a line, got line {number} of {manifest}: {error}") from error
    if not rows:
        raise ValueError(f"expected at least one image in {manifest}, got an empty file; generate the run again")
    return canonical_order(rows)


def _read_plain_folder(folder: Path) -> list[ManifestRow]:
    names = _read_prompt_names(folder)
    rows = []
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = sorted(path for path in subfolder.iterdir() if _is_image(path))
        if not images and subfolder.name == METRICS:
            continue
        if not images:
            raise ValueError(
                f"expected images ({', '.join(IMAGE_SUFFIXES)}) in every subfolder of {folder}, got none in "
                f"{subfolder.name!r}; remove it, or, if this is a run folder, "
                f"finish the run: it has no {MANIFEST}"
            )
        name = names.pop(subfolder.name, {})
        for index, image in enumerate(images):
            rows.append(
                ManifestRow(
                    path=image.relative_to(folder).as_posix(),
                    prompt_id=subfolder.name,
                    prompt=name.get("prompt", subfolder.name),
                    category=name.get("category", subfolder.name),
                    group_seed=0,
                    index=index,
                    seed=UNKNOWN_SEED,
                )
            )
    if names:
        raise ValueError(
            f"expected every name in {folder / PROMPTS} to be a subfolder with images, got {sorted(names)}; "
            "correct the names"
        )
    if not rows:
        raise ValueError(
            f"expected {folder} to be a run folder with {MANIFEST}, or to hold one subfolder of images "
            "a prompt, got neither; move the images of each prompt into a subfolder named after it"
        )
    return canonical_order(rows)


def _read_prompt_names(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / PROMPTS
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got a syntax error: {error}") from error
    names: dict[str, dict[str, str]] = {}
    for subfolder, entry in document.items() if isinstance(document, dict) else [("the document", document)]:
        values = {"prompt": entry} if isinstance(entry, str) else entry
        if (
            not isinstance(values, dict)
            or not set(values) <= {"prompt", "category"}
            or not all(isinstance(value, str) for value in values.values())
        ):
            raise ValueError(
                f"expected {path} to map subfolders to a prompt or to {{'prompt': ..., 'category': ...}}, "
                f"got {entry!r} for {subfolder!r}; correct it"
            )
        names[subfolder] = values
    return names


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def group_rows(rows: Iterable[ManifestRow]) -> dict[str, list[ManifestRow]]:
    """Gather rows by group id, groups and images in canonical order."""
    groups: dict[str, list[ManifestRow]] = {}
    for row in canonical_order(rows):
        groups.setdefault(row.group_id, []).append(row)
    return groups


def load_image(path: str | Path) -> torch.Tensor:
    """Read an image as 8-bit RGB.

    Transparency is composited on white, grey is repeated over the channels, a palette is looked up and a
    camera's orientation tag is applied. Colour spaces that would have to be guessed (CMYK, 16-bit grey, ...)
    are refused.

    Returns:
        uint8 tensor [3, H, W] in [0, 255].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not an image or in an unsupported colour space; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file; the folder is incomplete")
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"expected a readable image, got a damaged or foreign file: {path} ({error}); make it again"
        ) from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(
            f"expected an RGB, RGBA, grey or palette image, got mode {image.mode} in {path}; convert it to 8-bit RGB"
        )
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(folder: str | Path) -> str:
    """Return `rows_hash` of all images of a folder."""
    return rows_hash(folder, read_manifest(folder))


def rows_hash(folder: str | Path, rows: Iterable[ManifestRow]) -> str:
    """Return a SHA-256 that changes when the set of images changes; the order of `rows` does not matter.

    In a run folder it is that of the manifest's lines: the images of a finished run do not change. A plain
    folder may change at any time, so there the content of every image counts too.
    """
    folder = Path(folder)
    plain = not (folder / MANIFEST).is_file()
    digest = hashlib.sha256()
    for row in canonical_order(rows):
        digest.update((canonical_json(row.to_dict()) + "\n").encode())
        if plain:
            digest.update((content_hash(folder / row.path) + "\n").encode())
    return digest.hexdigest()
