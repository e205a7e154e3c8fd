"""The figures of the curves: what the method adds, over the batch, the resolution and the length of the window."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import FAINT, labelled, new_figure, numbered, styled
from experiments.timing.cases import BOUND, PLAIN

#: Columns that say on what was measured: a figure has a row of panels for each.
SETUP = ["weights", "dtype", "compiled", "device", "threads"]
#: By panel: the part of the table, what stays the same in it, the column that it is over and the one that it shows,
#: how the former is called, and what the latter is added to.
PANELS = {
    "batch": ("batch", ["side"], "batch", "inside_ratio", "images in a call", "a step"),
    "resolution": ("resolution", ["batch"], "side", "inside_ratio", "side, pixels", "a step"),
    "memory": ("resolution", ["batch"], "side", "peak_mib", "side, pixels", ""),
    "window": ("window", ["side", "batch"], "steps_inside", "call_ratio", "steps in the window, of", "a whole call"),
}


def setup_of(row: pd.Series) -> str:
    """Say on what a row was measured."""
    threads = "" if pd.isna(row["threads"]) else f", {row['threads']:.0f} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['device']}{threads}{', compiled' if row['compiled'] else ''}"


def curve_models(frame: pd.DataFrame) -> list[str]:
    """Return the models that have a curve of two points or more."""
    curves = frame[frame["part"].isin(["batch", "resolution", "window"])]
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
    frame = frame[(frame["model"] == model) & frame["part"].isin(["batch", "resolution", "window"])]
    panels = []  # of every panel its kind, and the values that stay the same, by column
    for kind, (part, same, _, shown, *_) in PANELS.items():
        rows = frame[(frame["part"] == part) & frame[shown].notna()]
        panels += [(kind, dict(row)) for _, row in rows[same].drop_duplicates().iterrows()]
    setups = [rows for _, rows in frame.groupby(SETUP, sort=False, dropna=False)]
    figure, axes = new_figure(len(panels), 2.9 * len(panels), 0.9 + 2.4 * len(setups), len(setups))
    for line, rows in zip(axes, setups, strict=True):
        for axis, (kind, same) in zip(line, panels, strict=True):
            here = rows[(rows["part"] == PANELS[kind][0]) & (rows[list(same)] == pd.Series(same)).all(axis=1)]
            axis.set_visible(not here.empty)
            _draw(axis, kind, here, titles)
            texts = {"side": "{0:.0f} x {0:.0f}", "batch": "{0:.0f} images"}
            axis.set_title(", ".join(texts[column].format(value) for column, value in same.items()))
        if len(setups) > 1:
            line[0].set_ylabel(f"{setup_of(rows.iloc[0])}\n{line[0].get_ylabel()}")
    handles = labelled(*axes.flat)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    where = f" on {setup_of(frame.iloc[0])}" if len(setups) == 1 else ""
    figure.suptitle(f"{model}{where}: what is added to the same calls without NegToMe; bars: 95 % intervals")
    return figure


def _draw(axis: Axes, kind: str, rows: pd.DataFrame, titles: Mapping[str, str]) -> None:
    _, _, x, shown, across, what = PANELS[kind]
    for number, name in enumerate(name for name in rows["variant"].unique() if name != PLAIN):
        points = rows[rows["variant"] == name].sort_values(x)
        if kind == "memory":
            plain = rows[rows["variant"] == PLAIN].set_index(x)[shown]
            values, errors = points[shown] - points[x].map(plain), None
        else:
            values = 100 * (points[shown] - 1)
            low, high = (points[f"{shown}_{end}"].fillna(points[shown]) for end in ("low", "high"))
            errors = [(100 * (points[shown] - low)).clip(0), (100 * (high - points[shown])).clip(0)]
        # Black is for the run without.
        look = {"color": FAINT, "linestyle": "--"} if name == BOUND else numbered(number + 1)
        if values.notna().any():
            axis.errorbar(points[x], values, yerr=errors, label=titles.get(name, name), **look)
    if kind == "batch":
        ticks = sorted(rows[x].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{value:.0f}" for value in ticks])
        axis.minorticks_off()
    axis.set_xlabel(f"{across} {rows['steps'].max():.0f}" if kind == "window" else across)
    axis.set_ylabel("extra peak memory, MiB" if kind == "memory" else f"added to {what}, %")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid()
