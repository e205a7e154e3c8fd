"""Images side by side: any on a contact sheet, and the same groups of several runs."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from eval.files import write_bytes
from eval.images import ManifestRow, WithheldRow, group_rows, load_picture, read_manifest, read_withheld
from experiments.choose import chosen_run, pareto_front
from experiments.figures.style import title
from experiments.identity import canonical
from experiments.pages import run_labels
from experiments.runs import Run
from experiments.tables import primary_pair

#: Of a sheet, in pixels: the column of labels, what lies between blocks of images and between rows, and a letter.
LABELS, GAP, SPACE, LETTER = 190, 12, 4, 8
#: What stands in the place of images: its colour.
PLATE = "lightgrey"


def contact_sheet(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image | Path] | str]]],
    tile: int = 96,
) -> Image.Image:
    """Set images in rows, each with its label, and in blocks of columns, each under its head.

    Args:
        heads: one for every block.
        rows: label, and for every block its images or their files, or a text that stands in their place; a block is as
            wide as its longest row of images.
        tile: side of an image in pixels.

    Raises:
        ValueError: a file is no image; the message names it.
    """
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    sizes = [
        max(1 if isinstance(blocks[number], str) else len(blocks[number]) for _, blocks in rows)
        for number in range(len(heads))
    ]
    lefts = [LABELS + sum(sizes[:number]) * tile + number * GAP for number in range(len(heads) + 1)]
    heads = [_wrapped(head, size * tile // LETTER) for head, size in zip(heads, sizes, strict=True)]
    header = 8 + 16 * max(head.count("\n") + 1 for head in heads)
    sheet = Image.new("RGB", (lefts[-1], header + len(rows) * (tile + SPACE)), "white")
    draw = ImageDraw.Draw(sheet)
    for head, left in zip(heads, lefts, strict=False):
        draw.multiline_text((left, 4), head, "black", font)
    for line, (label, blocks) in enumerate(rows):
        top = header + line * (tile + SPACE)
        draw.multiline_text((4, top + tile // 3), _wrapped(label), "black", font)
        for left, size, images in zip(lefts, sizes, blocks, strict=False):
            if isinstance(images, str):
                draw.rectangle((left, top, left + size * tile - 1, top + tile - 1), PLATE, "black")
                width, lines = size * tile // LETTER - 2, tile // 16 - 1
                text = textwrap.wrap(images, max(width, 1), max_lines=max(lines, 1), placeholder=" ...")
                draw.multiline_text((left + 4, top + 4), "\n".join(text), "black", font)
                continue
            for index, image in enumerate(images):
                picture = load_picture(image) if isinstance(image, Path) else image.convert("RGB")
                sheet.paste(picture.resize((tile, tile), Image.Resampling.LANCZOS), (left + index * tile, top))
    return sheet


def _wrapped(text: str, length: int = 24) -> str:
    return textwrap.fill(text, length + 1, break_long_words=False, break_on_hyphens=False)


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a sheet of images as a PNG of 256 colours; returns the file."""
    file = io.BytesIO()
    sheet.quantize(256).save(file, format="png", optimize=True)
    return write_bytes(path, file.getvalue())


def image_grid(
    runs: Sequence[Run],
    titles: Sequence[str],
    leading: Mapping[str, Path] | None = None,
    groups: int = 6,
) -> Image.Image:
    """Set the same groups side by side: one row a group, one block of images a run, or why they are withheld.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        titles: what to call each.
        leading: category -> a picture to stand before the runs' images, such as a protected asset; only groups of
            these categories are shown. None: all, without such a picture.
        groups: rows, each of another category, spread evenly over the groups' names.

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
    firsts = sorted({category[group]: group for group in reversed(shared)}.values())
    rows = []
    for group in _spread(firsts, groups):
        blocks = [_block(run, manifest[group]) for run, manifest in zip(runs, manifests, strict=True)]
        blocks = blocks if leading is None else [[leading[category[group]]], *blocks]
        rows.append((first[group].prompt, blocks))
    return contact_sheet([*titles] if leading is None else ["asset", *titles], rows)


def _block(run: Run, found: list[ManifestRow] | WithheldRow) -> list[Path] | str:
    return str(found) if isinstance(found, WithheldRow) else [run.folder / row.path for row in found]


def worth_showing(runs: Sequence[Run], frame: pd.DataFrame, most: int = 6) -> dict[Run, str]:
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
    calls = [canonical(request["model"]["call"]) for request in requests.values()]
    if len(runs) > most and len(set(calls)) > 1:
        shown = [run for run, call in zip(runs, calls, strict=True) if call in (calls[0], calls[-1])][:most]
    elif len(runs) > most:
        part = frame[frame["run_id"].isin([run.id for run in runs])]
        measured = (part, *primary_pair(part), part["model"].iloc[0])
        kept = {*_spread(pareto_front(*measured), most - 2), chosen_run(*measured)}
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
