"""Image grids: images in labelled rows, in blocks under heads. The web shows a picture; a PDF keeps text as text."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from eval.files import canonical_json
from eval.images import ManifestRow, WithheldRow, group_rows, load_picture, read_manifest, read_withheld
from experiments.figures.style import Drawing, encode, fixed_width, scale, styled, title
from experiments.runs.store import Run
from experiments.tables.columns import primary_pair
from experiments.tables.pages import run_labels
from experiments.tables.selection import pareto_front, select_run

#: Pixels of a tile at most.
LARGEST = 256
#: Dots of an inch: a power of two, so that inches times it are whole pixels again.
DOTS = 128
#: What stands in the place of images: its colour.
PLATE = "lightgrey"
#: Of a grid in the web's style, in inches: the column of labels, what lies between blocks of images and between rows,
#: a line of text and the width of a letter.
LABELS, GAP, SPACE, LINE, LETTER = 1.5, 12 / DOTS, 4 / DOTS, 20 / DOTS, 0.075


class ImageGrid(Drawing):
    """An image grid; a notebook shows it as a JPEG, which has all colours in a quarter of a PNG's bytes."""

    kind: ClassVar[str] = "webp"
    dots: ClassVar[float] = DOTS

    _repr_png_ = None

    def _repr_jpeg_(self) -> bytes:
        return encode(self, "jpeg")


@styled
def image_grid(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image | Path] | str]]],
    tile: int | None = None,
) -> ImageGrid:
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
    grid, axis = _empty(*size)
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
    return grid


def _opened(image: Image.Image | Path) -> Image.Image:
    return load_picture(image) if isinstance(image, Path) else image.convert("RGB")


def _wrapped(text: str, letters: float) -> str:
    return textwrap.fill(text, max(int(letters), 1), break_long_words=False, break_on_hyphens=False)


def _empty(width: float, height: float) -> tuple[ImageGrid, Axes]:
    """Return a empty grid and axes over all of it, in inches from its upper left corner."""
    grid = ImageGrid(figsize=(width, height), dpi=DOTS, facecolor="white")
    axis = grid.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_autoscale_on(False)
    return grid, axis


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
    shown = textwrap.wrap(text, max(letters, len("...")), max_lines=max(lines, 1), placeholder=" ...")
    axis.text(left + edge, top + edge, "\n".join(shown), va="top")


def grid_of_runs(
    runs: Sequence[Run],
    titles: Sequence[str],
    leading: Mapping[str, Path] | None = None,
    values: Sequence[Mapping[str, float]] | None = None,
    groups: int = 6,
) -> ImageGrid:
    """Set the same groups side by side: one row a group, one block of images a run, or why they are withheld.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        titles: what to call each.
        leading: category -> a picture to stand before the runs' images, such as a protected asset; only groups of
            these categories are shown. None: all, without such a picture.
        values: of each run, group id -> value, which the labels show. The rows are then those of `median_groups`, by
            the gain of the second run over the first. None: they are spread evenly over the groups' names.
        groups: rows, each of another category.

    Raises:
        ValueError: the runs share no group, or an image is damaged.
    """
    manifests = [
        group_rows(read_manifest(run.folder)) | {row.group_id: row for row in read_withheld(run.folder)} for run in runs
    ]
    first = {group: rows if isinstance(rows, WithheldRow) else rows[0] for group, rows in manifests[0].items()}
    order = sorted(first, key=lambda group: (first[group].prompt_id, first[group].group_seed))
    category = {group: first[group].category for group in order}
    shared = [group for group in category if all(group in manifest for manifest in manifests)]
    shared = [group for group in shared if leading is None or category[group] in leading]
    if not shared:
        raise ValueError("The runs share no group: generate them with the same prompts")
    if values:
        gains = {group: values[1][group] - values[0][group] for group in shared}
        chosen = median_groups(gains, category, groups)
    else:
        chosen = _spread(sorted({category[group]: group for group in reversed(shared)}.values()), groups)
    rows = []
    for group in chosen:
        blocks = [_block(run, manifest[group]) for run, manifest in zip(runs, manifests, strict=True)]
        blocks = blocks if leading is None else [[leading[category[group]]], *blocks]
        numbers = ", ".join(f"{of_run[group]:.2f}" for of_run in values or [])
        rows.append((f"{first[group].prompt}: {numbers}" if numbers else first[group].prompt, blocks))
    return image_grid([*titles] if leading is None else ["asset", *titles], rows)


def median_groups(gains: Mapping[str, float], category: Mapping[str, str], most: int) -> list[str]:
    """Return at most so many groups, each with the median gain of its category, from the smallest to the largest.

    Args:
        gains: of every group. Of an even number of groups, the lower of the two in the middle is the median.
        category: of every group.
    """
    ordered: dict[str, list[str]] = {}
    for group in sorted(gains, key=lambda group: (gains[group], group)):
        ordered.setdefault(category[group], []).append(group)
    medians = [groups[(len(groups) - 1) // 2] for groups in ordered.values()]
    return _spread(sorted(medians, key=gains.__getitem__), most)


def _block(run: Run, found: list[ManifestRow] | WithheldRow) -> list[Path] | str:
    return str(found) if isinstance(found, WithheldRow) else [run.folder / row.path for row in found]


def select_runs(runs: Sequence[Run], frame: pd.DataFrame, most: int = 6) -> dict[Run, str]:
    """Return the runs of a model that an image grid has room for, of a sweep some that stand for the others.

    Where the baseline was swept along, as with guidance, those at both ends; else the baseline and settings spread
    evenly over the Pareto front, the chosen one among them.

    Args:
        runs: of one model.
        frame: the experiment's CSV.
        most: how many at most.

    Returns:
        Run -> what to call it.
    """
    requests = {run: run.identity["request"] for run in runs}
    shown = list(runs)
    calls = [canonical_json(request["model"]["call"]) for request in requests.values()]
    if len(runs) > most and len(set(calls)) > 1:
        shown = [run for run, call in zip(runs, calls, strict=True) if call in (calls[0], calls[-1])][:most]
    elif len(runs) > most:
        part = frame[frame["run_id"].isin([run.id for run in runs])]
        measured = (part, *primary_pair(part), part["model"].iloc[0])
        kept = {*_spread(pareto_front(*measured), most - 2), select_run(*measured)}
        shown = [run for run in runs if requests[run]["method"]["name"] == "none" or run.id in kept]
    labels = run_labels(frame)
    return {
        run: f"{requests[run]['model']['name']}: {title(labels[run.id], requests[run]['method']['name'], brief=True)}"
        for run in shown
    }


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the names, the first and the last among them, spread evenly."""
    count = min(most, len(names))
    return [names[round(place * (len(names) - 1) / max(count - 1, 1))] for place in range(count)]
