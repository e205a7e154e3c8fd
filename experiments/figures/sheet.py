"""Images on a contact sheet, in rows with labels and in blocks under heads: a picture, or a PDF whose text is text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from eval.images import load_picture
from experiments.figures.style import Drawing, encode, fixed_width, scale, styled

#: Pixels of a tile at most.
LARGEST = 256
#: Dots of an inch: a power of two, so that inches times it are whole pixels again.
DOTS = 128
#: What stands in the place of images: its colour.
PLATE = "lightgrey"
#: Of a sheet in the web's style, in inches: the column of labels, what lies between blocks of images and between rows,
#: a line of text and the width of a letter.
LABELS, GAP, SPACE, LINE, LETTER = 1.5, 12 / DOTS, 4 / DOTS, 20 / DOTS, 0.075


class Sheet(Drawing):
    """A contact sheet; a notebook shows it as a JPEG, which has all colours in a quarter of a PNG's bytes."""

    kind: ClassVar[str] = "webp"
    dots: ClassVar[float] = DOTS

    _repr_png_ = None

    def _repr_jpeg_(self) -> bytes:
        return encode(self, "jpeg")


@styled
def contact_sheet(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image | Path] | str]]],
    tile: int | None = None,
) -> Sheet:
    """Set images in rows, each with its label, and in blocks of columns, each under its head.

    Args:
        heads: one for every block.
        rows: label, and for every block its images or their files, or a text that stands in their place; a block is as
            wide as its longest row of images.
        tile: side of an image in pixels. None: that of the last block's first image, so that what was generated is
            shown pixel by pixel, but at most 256: images of 1024 pixels are reduced to a fourth.

    Raises:
        ValueError: a file is no image; the message names it.
    """
    rows = [
        (label, [block if isinstance(block, str) else [*map(_opened, block)] for block in blocks])
        for label, blocks in rows
    ]
    shown = [block[0] for _, blocks in rows for block in blocks[-1:] if block and not isinstance(block, str)]
    tile = tile or (min(max(shown[0].size), LARGEST) if shown else LARGEST)
    counts = [
        max(1 if isinstance(blocks[number], str) else len(blocks[number]) for _, blocks in rows)
        for number in range(len(heads))
    ]
    labels, gap, space, line, letter = (scale() * part for part in (LABELS, GAP, SPACE, LINE, LETTER))
    side = tile / DOTS
    if width := fixed_width():
        side = (width - labels - (len(heads) - 1) * gap) / sum(counts)
    lefts = [labels + sum(counts[:number]) * side + number * gap for number in range(len(heads))]
    heads = [_wrapped(head, count * side / letter) for head, count in zip(heads, counts, strict=True)]
    header = line * (0.5 + max(head.count("\n") + 1 for head in heads))
    names = [_wrapped(label, labels / letter) for label, _ in rows]
    heights = [max(side, line * (name.count("\n") + 1)) + space for name in names]
    size = (width or lefts[-1] + counts[-1] * side, header + sum(heights))
    sheet, axis = _empty(*size)
    for head, left in zip(heads, lefts, strict=True):
        axis.text(left, line / 4, head, va="top")
    top = header
    for name, (_, blocks), height in zip(names, rows, heights, strict=True):
        axis.text(line / 4, top + (height - space) / 2, name, va="center")
        for left, count, images in zip(lefts, counts, blocks, strict=True):
            if isinstance(images, str):
                _plate(axis, images, (left, top, count * side, side))
                continue
            for index, image in enumerate(images):
                _show(axis, ImageOps.contain(image, (tile, tile), Image.Resampling.LANCZOS), tile / side,
                      left + index * side, top)  # fmt: skip
        top += height
    return sheet


def _opened(image: Image.Image | Path) -> Image.Image:
    return load_picture(image) if isinstance(image, Path) else image.convert("RGB")


def _wrapped(text: str, letters: float) -> str:
    return textwrap.fill(text, max(int(letters), 1), break_long_words=False, break_on_hyphens=False)


def _empty(width: float, height: float) -> tuple[Sheet, Axes]:
    """Return a white sheet and axes over all of it, in inches from its upper left corner."""
    sheet = Sheet(figsize=(width, height), dpi=DOTS, facecolor="white")
    axis = sheet.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_autoscale_on(False)
    return sheet, axis


def _show(axis: Axes, image: Image.Image, dots: float, left: float, top: float) -> None:
    """Show an image, of so many pixels an inch, each as it is."""
    right, bottom = left + image.width / dots, top + image.height / dots
    axis.imshow(np.asarray(image), extent=(left, right, bottom, top), interpolation="none", aspect="auto")


def _plate(axis: Axes, text: str, place: tuple[float, float, float, float]) -> None:
    """Write a text, as far as there is room, on a plate of a place: left, top, width and height."""
    left, top, width, height = place
    axis.add_patch(Rectangle((left, top), width, height, facecolor=PLATE, edgecolor="black", linewidth=0.8))
    edge = scale() * LINE / 4
    letters, lines = int((width - 2 * edge) / (scale() * LETTER)), int((height - 2 * edge) / (scale() * LINE))
    told = textwrap.wrap(text, max(letters, len("...")), max_lines=max(lines, 1), placeholder=" ...")
    axis.text(left + edge, top + edge, "\n".join(told), va="top")
