"""How figures look: their style, a colour and a shape for every method, and files that are equal byte for byte."""

import contextlib
import functools
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.files import write_bytes
from experiments.runs import catalogue
from experiments.tables.columns import direction, humanize
from experiments.tables.pages import title_of

COLOURS, MARKERS = zip(*catalogue.PALETTE.values(), strict=True)
#: The number of the colour and the shape that a method keeps in every figure.
LOOKS = {name: [*catalogue.PALETTE].index(entry.colour) for name, entry in catalogue.entries().items() if entry.colour}
#: Of points that are not to be looked at first.
FAINT = "#8C8C8C"
#: Kept in every file: text stays text in a PDF, images keep their pixels, and the same numbers give the same bytes.
STYLE = {
    "font.family": "DejaVu Sans",
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "image.composite_image": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "negtome",
    "savefig.dpi": 150,
}
#: Points of the text in the style of the web, for which figures are laid out.
TEXT = 9.0


class Style(NamedTuple):
    """A use of figures: their width in inches, None if each has its own, and their sizes in points."""

    width: float | None
    sizes: dict[str, float]


STYLES = {
    "web": Style(None, {"font.size": TEXT, "lines.markersize": 5.0, "errorbar.capsize": 2.0}),
    # A column of a paper, at its size: nothing is scaled when it is set.
    "paper": Style(
        3.25,
        {
            "font.size": 7.0, "lines.markersize": 3.5, "errorbar.capsize": 1.5, "lines.linewidth": 1.0,
            "axes.linewidth": 0.6, "grid.linewidth": 0.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
            "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.labelpad": 2.5, "axes.titlepad": 4.0,
        },
    ),
}  # fmt: skip
#: Inches of a figure that can be read and printed.
WIDTHS = (3.0, 20.0)
#: Share of its width that a panel keeps beside others; where that is not there, panels go below each other.
KEPT = 0.6
#: Kinds of files that are no pictures, and what would make them differ from day to day.
METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
#: Key of the digest of a figure's inputs in a PNG.
INPUTS = "inputs"
#: How pictures are compressed: WebP without a visible loss, JPEG where WebP is not read.
PICTURES: dict[str, dict[str, Any]] = {
    "png": {"optimize": True},
    "webp": {"quality": 90, "method": 6},
    "jpeg": {"quality": 90, "subsampling": "4:4:4", "optimize": True},
}
_CURRENT: ContextVar[tuple[str, float | None]] = ContextVar("style", default=("web", None))
P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def using(name: str = "web", width: float | None = None) -> Iterator[None]:
    """Draw and save figures in a style.

    Args:
        name: one of `STYLES`.
        width: of the figures, in inches; None: the style's.

    Raises:
        ValueError: there is no such style, or nothing of this width can be read.
    """
    if name not in STYLES:
        raise ValueError(f"style={name}: expected one of {', '.join(STYLES)}")
    low, high = WIDTHS
    if width is not None and not (isinstance(width, int | float) and low <= width <= high):
        raise ValueError(
            f"width={width}: expected inches from {low:g} to {high:g}; a column of a paper has 3.25, a page 6.75"
        )
    token = _CURRENT.set((name, width))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate what draws a figure: it does so in the style that is being used."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(STYLE | STYLES[_CURRENT.get()[0]].sizes):
            return draw(*args, **kwargs)

    return drawn


def scale() -> float:
    """Return how large text is, beside the web's."""
    return STYLES[_CURRENT.get()[0]].sizes["font.size"] / TEXT


def fixed_width() -> float | None:
    """Return the width that all figures have, in inches; None where each has its own."""
    name, width = _CURRENT.get()
    return STYLES[name].width if width is None else width


class Drawing(Figure):
    """A figure that a notebook shows by itself: no pyplot, hence no state to close and no backend to choose."""

    #: Kind of file that is saved for the web.
    kind: ClassVar[str] = "png"
    #: Its dots per inch.
    dots: ClassVar[float] = STYLE["savefig.dpi"]

    def _repr_png_(self) -> bytes:
        return encode(self, "png", 90)


@styled
def encode(figure: Drawing, kind: str, dots: float | None = None, inputs: str | None = None) -> bytes:
    """Return the figure as a file of `kind`, one of png, webp, jpeg, pdf and svg; equal figures give equal bytes.

    Args:
        dots: of an inch; None: the figure's own.
        inputs: text that stands for what the figure shows, kept in the metadata of a PNG or WebP; see `save`.
    """
    file = io.BytesIO()
    if kind in METADATA:
        figure.savefig(file, format=kind, metadata=METADATA[kind])
        return file.getvalue()
    drawn, picture = pixels(figure, dots), io.BytesIO()
    if kind == "png":  # of few colours, in half the bytes
        drawn = drawn.quantize(128)
    metadata = {}
    if inputs is not None:
        metadata = {"xmp": inputs.encode()} if kind == "webp" else {"pnginfo": PngInfo()}
        if kind == "png":
            metadata["pnginfo"].add_text(INPUTS, inputs)
    drawn.save(picture, format=kind, **PICTURES[kind], **metadata)
    return picture.getvalue()


def find_unchanged(path: Path, kind: str, inputs: str) -> Path | None:
    """Return the file of a figure that was saved with the same `inputs` in this style, or None; see `save`."""
    if _CURRENT.get()[0] != "web":
        return None
    file = path.with_name(f"{path.name}.{kind}")
    try:
        with Image.open(file) as image:
            stored = image.info.get(INPUTS, image.info.get("xmp"))
    except (OSError, ValueError):  # no file, or no picture
        return None
    text = stored.decode(errors="replace") if isinstance(stored, bytes) else stored
    return file if text == _in_this_style(inputs) else None


def _in_this_style(inputs: str) -> str:
    return f"{inputs} {_CURRENT.get()[1]} {matplotlib.__version__}"


@styled
def pixels(figure: Drawing, dots: float | None = None) -> Image.Image:
    """Return the figure as it is seen; `dots` as in `encode`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots or figure.dots)
    return Image.open(file).convert("RGB")


def save(figure: Drawing, path: Path, inputs: str | None = None) -> Path:
    """Write a figure and return its file: a PNG or WebP, in the style of papers a PDF in the folder `paper` beside.

    Args:
        path: without a suffix.
        inputs: digest of what the figure shows. A PNG or WebP with the same digest stays as it is.
    """
    name, _ = _CURRENT.get()
    if name == "web":
        file = path.with_name(f"{path.name}.{figure.kind}")
        if inputs is None:
            return write_bytes(file, encode(figure, figure.kind))
        unchanged = find_unchanged(path, figure.kind, inputs)
        return unchanged or write_bytes(file, encode(figure, figure.kind, inputs=_in_this_style(inputs)))
    return write_bytes(path.parent / name / f"{path.name}.pdf", encode(figure, "pdf"))


def panels(count: int, width: float, height: float, most: int | None = None) -> tuple[Drawing, list[Axes]]:
    """Return a figure and its axes, each of `width` x `height` inches and side by side.

    Where the style's width has no room for that they are narrower, and as lower, and go below each other.

    Args:
        most: of panels side by side; None: all.
    """
    columns = most or count
    total = fixed_width() or columns * width
    columns = max(1, min(columns, int(total / (KEPT * scale() * width))))
    lines = -(-count // columns)
    figure = Drawing(figsize=(total, lines * height * min(1.0, total / columns / width)), layout="constrained")
    return figure, subplots(figure, lines, columns, count)


def subplots(figure: Drawing, lines: int, columns: int, count: int) -> list[Axes]:
    """Return so many axes of a figure, line by line; what is left of the last line stays empty."""
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def wrapped(text: str, inches: float) -> str:
    """Break a text into lines of so many inches, after commas and semicolons rather than elsewhere."""
    letters, lines = max(int(14.5 * inches / scale()), 8), [""]  # of DejaVu Sans at the web's size, in an inch
    for part in re.split("(?<=[,;]) ", text):
        longer = f"{lines[-1]} {part}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= letters else [*lines, part]
    fill = functools.partial(textwrap.fill, width=letters, break_long_words=False, break_on_hyphens=False)
    return min("\n".join(fill(line) for line in lines if line), fill(text), key=lambda found: found.count("\n"))


def look(method: str, methods: list[str]) -> dict[str, str]:
    """Return a method's colour and shape; methods unknown here take what the others of `methods` leave."""
    taken = {LOOKS[name] for name in methods if name in LOOKS} | {0}
    free = [number for number in range(len(COLOURS)) if number not in taken] or list(range(1, len(COLOURS)))
    others = [name for name in methods if name not in LOOKS]
    return numbered(LOOKS[method] if method in LOOKS else free[others.index(method) % len(free)])


def numbered(number: int) -> dict[str, str]:
    """Return the colour and shape of a number."""
    return {"color": COLOURS[number], "marker": MARKERS[number]}


def title(label: str, method: str, brief: bool = False) -> str:
    """Return what a figure calls a run.

    Args:
        label: of the run, from `pages.run_labels`.
        method: of the run.
        brief: leave out the method where settings follow, as where all runs are of one.
    """
    settings = label.removeprefix(method).strip()
    return settings if brief and settings and method != "none" else f"{title_of(method)} {settings}".strip()


def labelled(*axes: Axes) -> dict[str, Any]:
    """Return what the axes' legends hold, label -> handle, each label once."""
    return {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}


def legend_below(figure: Figure, *axes: Axes, size: float = 1.0) -> None:
    """Put the legend below the axes, which keep their height, in as many columns as have room.

    Args:
        size: of its text, beside the style's.
    """
    handles, size = labelled(*axes), size * scale()
    column = size * (0.45 + 0.075 * max(map(len, handles), default=0))  # inches: the mark, and letters
    columns = min(max(int(figure.get_figwidth() / column), 1), len(handles) or 1)
    figure.set_figheight(figure.get_figheight() + 0.19 * size * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=TEXT * size)


def head(figure: Figure, text: str) -> None:
    """Write a text above a figure, in as many lines as it takes."""
    figure.suptitle(wrapped(text, figure.get_figwidth()))


def entitle(axis: Axes, text: str, inches: float) -> None:
    """Write a text above axes, in lines of so many inches; of less in a style's width, where the axes have less."""
    axis.set_title(wrapped(text, 0.78 * width if (width := fixed_width()) else inches))


def name_axes(axis: Axes, x: str, y: str) -> None:
    """Write beside the axes what they show, in as many lines as it takes: before others are beside them."""
    width, height = axis.get_figure(root=True).get_size_inches() / axis.get_gridspec().get_geometry()[::-1]
    axis.set_xlabel(wrapped(x, 0.85 * width))
    axis.set_ylabel(wrapped(y, 0.75 * height))


def named(frame: pd.DataFrame, metric: str, paired: bool = False, separator: str = ", ") -> str:
    """Return what an axis says of a metric, or of its paired differences: its name, and which direction is better."""
    which = {True: "higher", False: "lower"}.get(direction(frame, metric), "neither")
    return f"{'difference in ' if paired else ''}{humanize(metric)}{separator}{which} is better"


def errors(rows: pd.Series | pd.DataFrame, value: str) -> np.ndarray:
    """Return the intervals [2, rows] of a column's values, below and above, of no length where not estimable."""
    low, high = (rows[bound] for bound in bounds(value))
    sides = np.array([rows[value] - low, high - rows[value]], dtype=float).reshape(2, -1)
    return np.nan_to_num(sides).clip(0)  # rounding of the table may put the value outside by a last digit


def bounds(value: str) -> tuple[str, str]:
    """Return the columns of the interval of a column's value."""
    name = {"value": "ci"}.get(value, value)
    return f"{name}_low", f"{name}_high"
