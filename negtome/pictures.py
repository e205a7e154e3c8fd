"""Pictures that say of themselves how they were made, and several of them on a sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from negtome.recipe import Recipe

#: The PNG text chunk (iTXt) that holds a recipe as JSON.
CHUNK = "negtome"
#: Pixels around and between the pictures of a sheet.
GAP = 8


def save(image: Image.Image, path: str | Path, recipe: Recipe) -> None:
    """Write a picture as PNG, with its recipe in a text chunk."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, json.dumps(recipe.to_dict()))
    image.save(path, format="PNG", pnginfo=chunk)


def read(path: str | Path) -> Recipe:
    """Return the recipe in a picture that `save` wrote, which whoever sent it may have changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or says nothing of NegToMe, or nothing that can be run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a picture at {path}, got no file; check the path")
    try:
        with Image.open(path) as image:
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a PNG that negtome made at {path}, got what cannot be read ({error})") from error
    if not isinstance(text, str):
        raise ValueError(
            f"expected a PNG that negtome made at {path}, got one without a recipe: it is another picture, or what "
            "edited or sent it left that out"
        )
    try:
        return Recipe.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a recipe in {path}, got what cannot be used: {error}") from error


def sheet(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]], note: str) -> Image.Image:
    """Put rows of pictures below each other, each under its label, with a title above and a note below them.

    Args:
        title, note: wrapped to the width of the rows.
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
        for line in _wrapped(text, font, whole - 2 * GAP):
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


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    """Break a text into lines of at most `width` pixels, within a word where one is longer."""
    lines, line = [], ""
    for word in text.split():
        while (whole := f"{line} {word}".strip()) and font.getlength(whole) > width:
            if not line:
                fits = max(1, sum(font.getlength(word[: end + 1]) <= width for end in range(len(word))))
                line, word = word[:fits], word[fits:]
            lines.append(line)
            line = ""
        line = whole
    return [*lines, line]
