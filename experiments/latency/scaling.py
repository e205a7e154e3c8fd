"""What NegToMe adds to a call, over the batch, the resolution and the length of the window."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import FAINT, errors, head, legend_below, numbered, panels, styled
from experiments.latency.cases import BOUND, PLAIN

#: Columns that say on what was measured: a figure has a row of panels for each.
SETUP = ["weights", "dtype", "compiled", "device", "threads"]
#: How a panel's title says what stays the same in it.
SAME = {"side": "{0:.0f} x {0:.0f}", "batch": "{0:.0f} images"}


class Panel(NamedTuple):
    """A curve: the part of the table, columns that are drawn and that stay the same in it, and what its axes say."""

    part: str
    x: str
    y: str  # a ratio to the same without, or memory
    same: list[str]
    xlabel: str
    ylabel: str

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that have something to draw."""
        return frame[(frame["part"] == self.part) & frame[self.y].notna()]


PANELS = [
    Panel("batch", "batch", "inside_ratio", ["side"], "images in a call", "added to a step, %"),
    Panel("resolution", "side", "inside_ratio", ["batch"], "side, pixels", "added to a step, %"),
    Panel("resolution", "side", "peak_mib", ["batch"], "side, pixels", "extra peak memory, MiB"),
    Panel("window", "steps_inside", "call_ratio", ["side", "batch"], "steps in the window", "added to a whole call, %"),
]


def setup_of(row: pd.Series) -> str:
    """Say on what a row was measured."""
    threads = "" if pd.isna(row["threads"]) else f", {row['threads']:.0f} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['device']}{threads}{', compiled' if row['compiled'] else ''}"


def curve_models(frame: pd.DataFrame) -> list[str]:
    """Return the models that have a curve of two points or more."""
    curves = frame[frame["part"].isin([panel.part for panel in PANELS])]
    points = curves.groupby(["model", "part"], sort=False)[["side", "batch", "t_low"]].nunique()
    return points[points.gt(1).any(axis=1)].index.unique("model").tolist()


@styled
def scaling(frame: pd.DataFrame, model: str, titles: Mapping[str, str]) -> Figure:
    """Draw what the method adds, over the batch, the resolution and the length of the window.

    A row of panels for every device; bars are 95 % intervals, none where there are too few rounds.

    Args:
        frame: rows of latency.csv.
        model: one of `curve_models`.
        titles: of the variants, by their names.

    Raises:
        ValueError: the table has no curve of this model.
    """
    if model not in curve_models(frame):
        raise ValueError(f"expected a model with curves ({', '.join(curve_models(frame))}), got {model!r}")
    frame = frame[frame["model"] == model]
    drawn = [(panel, same) for panel in PANELS for same, _ in panel.of(frame).groupby(panel.same, sort=False)]
    curves = frame[frame["part"].isin([panel.part for panel in PANELS])]
    setups = [rows for _, rows in curves.groupby(SETUP, sort=False, dropna=False)]
    figure, axes = panels(len(drawn) * len(setups), 2.9, 3.0, len(drawn))
    for number, rows in enumerate(setups):
        line = axes[number * len(drawn) :][: len(drawn)]
        for axis, (panel, same) in zip(line, drawn, strict=True):
            here = panel.of(rows)
            here = here[(here[panel.same] == list(same)).all(axis=1)]
            axis.set_visible(not here.empty)
            _draw(axis, panel, here, titles)
            axis.set_title(", ".join(SAME[name].format(value) for name, value in zip(panel.same, same, strict=True)))
        if len(setups) > 1:
            line[0].set_ylabel(f"{setup_of(rows.iloc[0])}\n{line[0].get_ylabel()}")
    legend_below(figure, *axes)
    where = f" on {setup_of(setups[0].iloc[0])}" if len(setups) == 1 else ""
    head(figure, f"{model}{where}: what is added to the same calls without NegToMe; bars: 95 % intervals")
    return figure


def _draw(axis: Axes, panel: Panel, rows: pd.DataFrame, titles: Mapping[str, str]) -> None:
    plain = rows[rows["variant"] == PLAIN].set_index(panel.x)[panel.y]
    compared = rows[rows["variant"] != PLAIN].groupby("variant", sort=False)
    for number, (name, points) in enumerate(compared, start=1):  # black, of number 0, is for the run without
        points = points.sort_values(panel.x)
        values, sides = points[panel.y] - points[panel.x].map(plain), None
        if panel.y.endswith("_ratio"):
            values, sides = 100 * (points[panel.y] - 1), 100 * errors(points, panel.y)
        look = {"color": FAINT, "linestyle": "--"} if name == BOUND else numbered(number)
        axis.errorbar(points[panel.x], values, yerr=sides, label=titles.get(name, name), **look)
    if panel.x == "batch" and len(rows):
        ticks = sorted(rows["batch"].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{value:.0f}" for value in ticks])
        axis.minorticks_off()
    of = f", of {rows['steps'].max():.0f}" if panel.part == "window" else ""
    axis.set(xlabel=f"{panel.xlabel}{of}", ylabel=panel.ylabel)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid()
