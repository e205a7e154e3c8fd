"""The figure of NegToMe's cost over the batch, the resolution and the length of the timestep range."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import FAINT, errors, head, legend_below, numbered, panels, styled
from experiments.latency.cases import BOUND, PLAIN

#: Columns of the device and weights; a figure has a row of panels for each.
SETUP = ["weights", "dtype", "compiled", "device", "threads"]
#: Titles of the columns that are constant in a panel.
SAME = {"side": "{0:.0f} x {0:.0f}", "batch": "{0:.0f} images"}


class Panel(NamedTuple):
    """A curve: the part of the table, the drawn and the constant columns, and the labels of the axes."""

    part: str
    x: str
    y: str  # a ratio to the baseline, or memory
    same: list[str]
    xlabel: str
    ylabel: str

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the rows to draw."""
        return frame[(frame["part"] == self.part) & frame[self.y].notna()]


PANELS = [
    Panel("batch", "batch", "inside_ratio", ["side"], "images in a call", "added to a step, %"),
    Panel("resolution", "side", "inside_ratio", ["batch"], "side, pixels", "added to a step, %"),
    Panel("resolution", "side", "peak_mib", ["batch"], "side, pixels", "extra peak memory, MiB"),
    Panel("window", "steps_inside", "call_ratio", ["side", "batch"], "steps in the window", "added to a whole call, %"),
]


def setup_of(row: pd.Series) -> str:
    """Describe the device of a row."""
    threads = "" if pd.isna(row["threads"]) else f", {row['threads']:.0f} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['device']}{threads}{', compiled' if row['compiled'] else ''}"


def curve_models(frame: pd.DataFrame) -> list[str]:
    """Return the models that have a curve of at least two points."""
    curves = frame[frame["part"].isin([panel.part for panel in PANELS])]
    points = curves.groupby(["model", "part"], sort=False)[["side", "batch", "t_low"]].nunique()
    return points[points.gt(1).any(axis=1)].index.unique("model").tolist()


@styled
def scaling(frame: pd.DataFrame, model: str, titles: Mapping[str, str]) -> Figure:
    """Draw the method's additional cost, a row of panels for every device.

    Bars are 95 % intervals; too few rounds have none.

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
    drawn = [(panel, same) for panel in PANELS for same, _ in panel.select(frame).groupby(panel.same, sort=False)]
    curves = frame[frame["part"].isin([panel.part for panel in PANELS])]
    setups = [rows for _, rows in curves.groupby(SETUP, sort=False, dropna=False)]
    figure, axes = panels(len(drawn) * len(setups), 2.9, 3.0, len(drawn))
    for number, rows in enumerate(setups):
        line = axes[number * len(drawn) :][: len(drawn)]
        for axis, (panel, same) in zip(line, drawn, strict=True):
            points = panel.select(rows)
            points = points[(points[panel.same] == list(same)).all(axis=1)]
            axis.set_visible(not points.empty)
            _draw(axis, panel, points, titles)
            axis.set_title(", ".join(SAME[name].format(value) for name, value in zip(panel.same, same, strict=True)))
        if len(setups) > 1:
            line[0].set_ylabel(f"{setup_of(rows.iloc[0])}\n{line[0].get_ylabel()}")
    legend_below(figure, *axes)
    device = f" on {setup_of(setups[0].iloc[0])}" if len(setups) == 1 else ""
    head(figure, f"{model}{device}: what is added to the same calls without NegToMe; bars: 95 % intervals")
    return figure


def _draw(axis: Axes, panel: Panel, rows: pd.DataFrame, titles: Mapping[str, str]) -> None:
    baseline = rows[rows["variant"] == PLAIN].set_index(panel.x)[panel.y]
    compared = rows[rows["variant"] != PLAIN].groupby("variant", sort=False)
    for number, (name, points) in enumerate(compared, start=1):  # number 0, black, is for the baseline
        points = points.sort_values(panel.x)
        values, sides = points[panel.y] - points[panel.x].map(baseline), None
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
