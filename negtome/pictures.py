"""Pictures that say of themselves how they were made, and several of them on a sheet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from negtome.recipe import Recipe

#: The PNG text chunk (iTXt) that holds a recipe as JSON.
CHUNK = "negtome"
#: The one that holds a digest of the pictures that it names; see `content`.
CONTENT = "negtome content"
#: Pixels around and between the pictures of a sheet.
GAP = 8
#: Lines of a text on a sheet; what goes on longer ends in three dots.
LINES = 20


def content(recipe: Recipe) -> str:
    """Return a digest of the files of the reference picture and its mask, which a recipe names by their paths alone.

    Returns:
        Hexadecimal digits; empty where there is no reference.

    Raises:
        OSError: there are no such files.
    """
    digests = []
    for path in (recipe.reference, recipe.mask):
        if path is not None:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).hexdigest() if digests else ""


def chunks(recipe: Recipe, made_from: str = "") -> PngImagePlugin.PngInfo:
    """Return the text chunks of a PNG: its recipe and, if any, the `content` that it was made from."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(recipe.to_dict()))
    if made_from:
        info.add_itxt(CONTENT, made_from)
    return info


def save(image: Image.Image, path: str | Path, recipe: Recipe, made_from: str = "") -> None:
    """Write a picture as PNG that holds its recipe; see `chunks` and `write`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks(recipe, made_from))
    write(path, buffer.getvalue())


def write(path: str | Path, data: bytes) -> None:
    """Write a file so that its name never stands for a part of it.

    Raises:
        OSError: it cannot be written; the message says which.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"cannot write {path} ({error.strerror or error}); make room, and run the same again") from error


def read(path: str | Path) -> Recipe:
    """Return the recipe in a picture that `save` wrote, which whoever sent it may have changed; see `read_both`."""
    return read_both(path)[0]


def read_both(path: str | Path) -> tuple[Recipe, str]:
    """Return the recipe and the `content` in a picture, the latter empty where it keeps none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or says nothing of NegToMe, or nothing that can be run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a picture at {path}, got no file; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its pixels are not decoded
            image = Image.open(path)
        with image:
            text, made_from = image.info.get(CHUNK), image.info.get(CONTENT, "")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a PNG that negtome made at {path}, got what cannot be read ({error})") from error
    if not isinstance(text, str):
        raise ValueError(
            f"expected a PNG that negtome made at {path}, got one without a recipe: it is another picture, or what "
            "edited or sent it left that out"
        )
    try:
        return Recipe.from_dict(json.loads(text)), str(made_from)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a recipe in {path}, got what cannot be used: {error}") from error


def sheet(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]], note: str) -> Image.Image:
    """Put rows of pictures below each other, each under its label, with a title above and a note below them.

    Args:
        title, note: wrapped to the width of the rows, and cut after `LINES` lines.
        rows: label and pictures of each row, as many in each, all of one size.
    """
    pictures = rows[0][1]
    width, height = pictures[0].size
    whole = max(len(pictures) * (width + GAP) + GAP, 40 * GAP)
    size = max(12, width // 24)
    parts: list[tuple[int, Any]] = []  # each at its height
    y = GAP

    def write(text: str, factor: float = 1.0) -> None:
        nonlocal y
        font = ImageFont.load_default(size=size * factor)
        lines = wrap(text, font, whole - 2 * GAP)
        for line in lines if len(lines) <= LINES else [*lines[:LINES], "..."]:
            parts.append((y, (line, font)))
            y += round(1.4 * size * factor)

    write(title, 1.3)
    for label, images in rows:
        y += GAP
        write(label)
        parts.append((y, images))
        y += height + GAP
    write(note)
    canvas = Image.new("RGB", (whole, y + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for top, part in parts:
        if isinstance(part, tuple):
            draw.text((GAP, top), part[0], fill="black", font=part[1])
        else:
            for column, image in enumerate(part):
                canvas.paste(image, (GAP + column * (width + GAP), top))
    return canvas


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break a text into lines at its spaces, and within a word that is longer than a line.

    Args:
        text: any; runs of white space count as one space.
        font: in which the text is measured.
        width: of a line, in pixels; a single character may be wider.

    Returns:
        At least one line.
    """
    lines, line = [], ""
    for word in text.split():
        rest = word
        while rest:
            candidate = f"{line} {rest}" if line else rest
            fits = _longest_prefix(candidate, font, width)
            if fits == len(candidate):
                line = candidate
                break
            if not line:
                line, rest = rest[:fits], rest[fits:]
            lines.append(line)
            line = ""
    return [*lines, line]


def _longest_prefix(text: str, font: Any, width: float) -> int:
    """Count the characters that fit into a width, at least 1, without measuring much more of the text than these."""
    end = 1
    while end < len(text) and font.getlength(text[:end]) <= width:
        end *= 2
    ends = range(min(end, len(text)) + 1)
    return max(1, bisect_right(ends, width, key=lambda size: font.getlength(text[:size])) - 1)
