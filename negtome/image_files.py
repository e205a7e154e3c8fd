"""PNG files that hold the recipe of their image, and grids of images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from negtome.recipe import Recipe

#: PNG text chunk (iTXt) that holds a recipe as JSON.
CHUNK = "negtome"
#: PNG text chunk that holds a digest of the files that the recipe names; see `content`.
CONTENT = "negtome content"
#: Pixels around and between the images of a grid.
GAP = 8
#: Most lines of a text in a grid; a longer one ends in three dots.
LINES = 20


def content(recipe: Recipe) -> str:
    """Return a digest of the reference image and its mask, which a recipe names only by path.

    Returns:
        Hexadecimal digits; empty without a reference.

    Raises:
        OSError: a file cannot be read.
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
    """Write an image as PNG with its recipe; see `chunks` and `write`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks(recipe, made_from))
    write(path, buffer.getvalue())


def write(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"cannot write {path} ({error.strerror or error}); make room and repeat the command") from error


def read(path: str | Path) -> Recipe:
    """Return the recipe in an image that `save` wrote. Its sender may have changed it; see `read_both`."""
    return read_both(path)[0]


def read_both(path: str | Path) -> tuple[Recipe, str]:
    """Return the recipe and the `content` in an image; the latter is empty if the image has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, has no recipe, or has one that cannot be used.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its pixels are not decoded
            image = Image.open(path)
        with image:
            text, made_from = image.info.get(CHUNK), image.info.get(CONTENT, "")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a PNG that negtome made ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{path} has no recipe: negtome did not make it, or another program removed the recipe")
    try:
        return Recipe.from_dict(json.loads(text)), str(made_from)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the recipe in {path} cannot be used: {error}") from error


def image_grid(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]], note: str) -> Image.Image:
    """Arrange rows of images below each other, each under its label, with a title above and a note below.

    Args:
        title, note: wrapped to the width of the rows, and cut after `LINES` lines.
        rows: label and images of each row; all rows have as many images, all of one size.
    """
    width, height = rows[0][1][0].size
    full_width = max(len(rows[0][1]) * (width + GAP) + GAP, 40 * GAP)
    size = max(12, width // 24)
    font, title_font = ImageFont.load_default(size=size), ImageFont.load_default(size=1.3 * size)
    texts = [wrap(title, title_font, full_width - 2 * GAP)]
    texts += [wrap(text, font, full_width - 2 * GAP) for text in (*(label for label, _ in rows), note)]
    line_height = round(1.4 * size)
    title_height = round(1.4 * size * 1.3)
    full_height = title_height * len(texts[0]) + line_height * sum(len(lines) for lines in texts[1:])
    full_height += len(rows) * (2 * GAP + height) + 2 * GAP
    grid = Image.new("RGB", (full_width, full_height), "white")
    draw = ImageDraw.Draw(grid)

    def write_lines(lines: list[str], y: int, font: Any, step: int) -> int:
        for number, line in enumerate(lines):
            draw.text((GAP, y + number * step), line, fill="black", font=font)
        return y + len(lines) * step

    y = write_lines(texts[0], GAP, title_font, title_height)
    for lines, (_, images) in zip(texts[1:], rows, strict=False):
        y = write_lines(lines, y + GAP, font, line_height)
        for column, image in enumerate(images):
            grid.paste(image, (GAP + column * (width + GAP), y))
        y += height + GAP
    write_lines(texts[-1], y, font, line_height)
    return grid


def wrap(text: str, font: Any, width: float) -> list[str]:
    """Break a text into at most `LINES` lines of at most `width` pixels, if three characters fit into them."""
    characters = 500
    while True:
        lines = textwrap.wrap(text[: characters * (LINES + 1)], characters, max_lines=LINES, placeholder="...") or [""]
        widest = max(font.getlength(line) for line in lines)
        if widest <= width or characters == 3:
            return lines
        characters = max(3, min(characters - 1, int(characters * width / widest)))
