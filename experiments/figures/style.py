"""How figures look: one style, a colour and a shape for every method, and files that are equal byte for byte."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eval.files import write_bytes
from experiments import catalogue
from experiments.tables import direction, words

#: How a method is called in figures where its name in tables is too terse.
TITLES = {name: entry.title for name, entry in catalogue.entries().items()}
COLOURS, MARKERS = zip(*catalogue.PALETTE.values(), strict=True)
#: The number of the colour and the shape that a method keeps in every figure.
LOOKS = {name: [*catalogue.PALETTE].index(entry.colour) for name, entry in catalogue.entries().items() if entry.colour}
#: Of points that are not to be looked at first.
FAINT = "#8C8C8C"
#: Kept in every file: text stays text in a PDF, and the same numbers give the same bytes.
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5.0,
    "errorbar.capsize": 2.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "negtome",
    "savefig.dpi": 150,
}
#: Decorates what draws a figure.
styled = rc_context(STYLE)
#: Kinds of files that figures are written as, and what would make them differ from day to day.
METADATA: dict[str, dict[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Drawing(Figure):
    """A figure that a notebook shows by itself: no pyplot, hence no state to close and no backend to choose."""

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


@styled
def encode(figure: Figure, kind: str) -> bytes:
    """Return the figure as a file of `kind`, one of png, pdf and svg; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=METADATA[kind])
    if kind == "png":  # of few colours, in half the bytes
        drawn, file = Image.open(file).convert("RGB"), io.BytesIO()
        drawn.quantize(128).save(file, format="png", optimize=True)
    return file.getvalue()


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as a vector PDF and as a PNG; `path` has no suffix. Returns the two files."""
    return [write_bytes(path.with_name(f"{path.name}.{kind}"), encode(figure, kind)) for kind in ("png", "pdf")]


def new_figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Drawing, Any]:
    """Return a figure of `width` x `height` inches and its axes [rows, columns]."""
    figure = Drawing(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


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
    return settings if brief and settings and method != "none" else f"{TITLES.get(method, method)} {settings}".strip()


def labelled(*axes: Axes) -> dict[str, Any]:
    """Return what the axes' legends hold, label -> handle, each label once."""
    return {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}


def legend_below(figure: Figure, *axes: Axes) -> None:
    """Put the legend below the axes, which keep their height, in as many columns as have room."""
    handles = labelled(*axes)
    column = 0.45 + 0.075 * max(map(len, handles), default=0)  # inches: the mark, and letters of the style's size
    columns = min(max(int(figure.get_figwidth() / column), 1), len(handles) or 1)
    figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def named(frame: pd.DataFrame, metric: str, paired: bool = False, separator: str = ", ") -> str:
    """Return what an axis says of a metric, or of its paired differences: its name, and which direction is better."""
    which = {True: "higher", False: "lower"}.get(direction(frame, metric), "neither")
    return f"{'difference in ' if paired else ''}{words(metric)}{separator}{which} is better"


def errors(rows: pd.Series | pd.DataFrame, value: str) -> np.ndarray:
    """Return the intervals [2, rows] of a column's values, below and above, of no length where not estimable."""
    low, high = (rows[bound] for bound in bounds(value))
    sides = np.array([rows[value] - low, high - rows[value]], dtype=float).reshape(2, -1)
    return np.nan_to_num(sides).clip(0)  # rounding of the table may put the value outside by a last digit


def bounds(value: str) -> tuple[str, str]:
    """Return the columns of the interval of a column's value."""
    name = {"value": "ci"}.get(value, value)
    return f"{name}_low", f"{name}_high"
