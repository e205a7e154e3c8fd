"""Many methods at once, each a path over its own setting: what they give against what they cost."""

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import style
from experiments.figures.labels import Label, put_beside
from experiments.tables.columns import filter_model
from experiments.tables.selection import differences, pareto_front

#: Beginnings of the names of metrics of whole sets of images, one of which gets a panel beside the primary one.
OF_SETS = ("frechet", "fid")


@style.styled
def fronts(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> Figure:
    """Draw the gain of many methods against quality, a Frechet distance and seconds, as far as the table has them.

    Every method is a path from the baseline through its settings, weakest first, with a number at its strongest and
    crosses for the 95 % intervals of what is on the front. A method keeps its number, colour and shape in all panels.

    Args:
        frame: an experiment's CSV, the runs of a method in the order of its settings.
        primary_metric: metric that the methods are to improve, on all x axes.
        quality: metric on the first panel's y axis.
        model: one of the CSV's models.
    """
    part = filter_model(frame, model)
    compared = part[part["difference"].notna()]
    names = [name for name in compared["method"].unique() if name != "none"]
    of_sets = [name for name in compared["metric"].unique() if name.startswith(OF_SETS)][:1]
    costs = [quality, *of_sets, *(["seconds"] if part["seconds"].notna().any() else [])]
    # In colours: what is on the front, and what merges tokens.
    shown = {*_front(frame, primary_metric, quality, model), *part.loc[part["pushed_share"].notna(), "run_id"]}
    looks = _looks(names, set(part.loc[part["run_id"].isin(shown), "method"]))
    figure, axes = style.panels(len(costs), 4.6, 4.0)
    ends = []
    for axis, cost in zip(axes, costs, strict=True):
        points = (
            _with_seconds(frame, primary_metric, quality, model)
            if cost == "seconds"
            else differences(frame, primary_metric, cost, model)
        )
        front = _front(frame, primary_metric, cost, model) if cost != "seconds" else []
        ends.append(_paths(axis, points, front, names, looks))
        if cost != "seconds" and points["margin"].notna().any():
            bound = -points["margin"].max() * points["y_sign"].iloc[0]
            axis.axhline(bound, color="black", linestyle="--", linewidth=0.8, label="the margin of quality")
        y = "seconds an image, of this machine" if cost == "seconds" else style.named(frame, cost, True)
        style.name_axes(axis, style.named(frame, primary_metric, True), y)
        axis.grid()
    style.legend_below(figure, *axes[:1], size=7.5 / style.TEXT)
    style.head(figure, f"{model}: each method over its hyperparameter")
    for axis, labels in zip(axes, ends, strict=True):
        put_beside(axis, labels, "small")
    return figure


def _front(frame: pd.DataFrame, primary_metric: str, cost: str, model: str) -> list[str]:
    """Return the runs that no other one beats, without those that lose more than the cost's margin."""
    points = differences(frame, primary_metric, cost, model)
    lost = -points["y"] * points["y_sign"]
    return [run for run in pareto_front(frame, primary_metric, cost, model) if not lost[run] > points["margin"].max()]


def _looks(names: list[str], best: set[str]) -> dict[str, dict]:
    """Return how methods are drawn: the best in colours, each of which a shape keeps apart, others faint."""
    shown = [number for number in range(1, len(style.COLOURS))]
    looks, taken = {}, 0
    for name in names:
        if name in best:
            number = shown[taken % len(shown)]
            looks[name] = style.numbered(number) | {"linestyle": ("-", "--", ":")[taken // len(shown) % 3], "zorder": 3}
            taken += 1
        else:
            looks[name] = {"color": style.FAINT, "marker": ".", "linestyle": "-", "alpha": 0.7, "zorder": 2}
    return looks


def _paths(axis: Axes, points: pd.DataFrame, front: list[str], names: list[str], looks: dict[str, dict]) -> list[Label]:
    """Draw the paths and return the labels of their strongest settings."""
    origin = points[points["method"] == "none"].iloc[0]
    axis.axvline(0, color="black", linewidth=0.6)
    if origin["y"] == 0:
        axis.axhline(0, color="black", linewidth=0.6)
    axis.plot(origin["x"], origin["y"], "o", color="black", label="baseline", zorder=4)
    for number, name in enumerate(names, 1):
        rows = points[points["method"] == name]
        path = pd.concat([origin.to_frame().T, rows])
        axis.plot(
            path["x"].astype(float), path["y"].astype(float), linewidth=1.0,
            markersize=0.8 * rcParams["lines.markersize"], markevery=slice(1, None),
            label=f"{number}  {style.title(name, name)}", **looks[name],
        )  # fmt: skip
        for _, row in rows[rows.index.isin(front)].iterrows():
            seen = {"ecolor": looks[name]["color"], "alpha": 0.4, "linewidth": 0.8, "capsize": 0}
            axis.errorbar(
                row["x"], row["y"], xerr=style.errors(row, "x"), yerr=style.errors(row, "y"), fmt="none", **seen
            )
    ends = [(number, points[points["method"] == name], looks[name]["color"]) for number, name in enumerate(names, 1)]
    return [Label(f"{number}", (rows["x"].iloc[-1], rows["y"].iloc[-1]), colour) for number, rows, colour in ends
            if len(rows)]  # fmt: skip


def _with_seconds(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> pd.DataFrame:
    """Return the points of the primary metric with the runs' seconds an image as y."""
    points = differences(frame, primary_metric, quality, model)
    seconds = filter_model(frame, model, primary_metric).drop_duplicates("run_id").set_index("run_id")["seconds"]
    return points.assign(y=seconds.reindex(points.index), y_low=np.nan, y_high=np.nan)
