"""Many methods at once, each a path over its own setting: what they give against what they cost."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments.choose import differences, pareto_front
from experiments.figures import style
from experiments.tables import of_model

#: Where a number may stand beside its point, in points, the first that is free.
BESIDE = [
    (6, 4),
    (6, -9),
    (-11, 4),
    (-11, -9),
    (-2, 9),
    (-2, -15),
    (14, 9),
    (14, -15),
    (-20, 9),
    (-20, -15),
    (22, -2),
    (-28, -2),
]
#: Beginnings of the names of metrics of whole sets of images, one of which gets a panel beside the primary one.
OF_SETS = ("frechet", "fid")


@style.styled
def fronts(frame: pd.DataFrame, claim: str, quality: str, model: str) -> Figure:
    """Draw what methods do for a claim against quality, a Frechet distance and seconds, as far as the table has them.

    Every method is a path from nothing done through its settings, weakest first, with a number at its strongest and
    crosses for the 95 % intervals of what is on the front. A method keeps its number, colour and shape in all panels.

    Args:
        frame: an experiment's CSV, the runs of a method in the order of its settings.
        claim: metric that the methods are to improve, on all x axes.
        quality: metric on the first panel's y axis.
        model: one of the CSV's models.
    """
    part = of_model(frame, model)
    compared = part[part["difference"].notna()]
    names = [name for name in compared["method"].unique() if name != "none"]
    of_sets = [name for name in compared["metric"].unique() if name.startswith(OF_SETS)][:1]
    costs = [quality, *of_sets, *(["seconds"] if part["seconds"].notna().any() else [])]
    # In colours: what is on the front, and what merges tokens.
    shown = {*_front(frame, claim, quality, model), *part.loc[part["pushed_share"].notna(), "run_id"]}
    looks = _looks(names, set(part.loc[part["run_id"].isin(shown), "method"]))
    figure, (axes,) = style.new_figure(len(costs), 4.6 * len(costs), 4.8)
    for axis, cost in zip(axes, costs, strict=True):
        points = (
            _with_seconds(frame, claim, quality, model) if cost == "seconds" else differences(frame, claim, cost, model)
        )
        front = _front(frame, claim, cost, model) if cost != "seconds" else []
        _paths(axis, points, front, names, looks)
        if cost != "seconds" and points["margin"].notna().any():
            bound = -points["margin"].max() * points["y_sign"].iloc[0]
            axis.axhline(bound, color="black", linestyle="--", linewidth=0.8, label="the margin of quality")
        axis.set(xlabel=style.named(frame, claim, paired=True, separator="\n"))
        axis.set_ylabel("seconds an image, of this machine" if cost == "seconds" else style.named(frame, cost, True))
        axis.grid()
    handles = style.labelled(axes[0])
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, len(costs) * 2), fontsize=7.5
    )
    figure.suptitle(f"{model}: each method over its own setting")
    return figure


def _front(frame: pd.DataFrame, claim: str, cost: str, model: str) -> list[str]:
    """Return the runs that no other one beats, without those that lose more than the cost's margin."""
    points = differences(frame, claim, cost, model)
    lost = -points["y"] * points["y_sign"]
    return [run for run in pareto_front(frame, claim, cost, model) if not lost[run] > points["margin"].max()]


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


def _paths(axis: Axes, points: pd.DataFrame, front: list[str], names: list[str], looks: dict[str, dict]) -> None:
    origin = points[points["method"] == "none"].iloc[0]
    axis.axvline(0, color="black", linewidth=0.6)
    if origin["y"] == 0:
        axis.axhline(0, color="black", linewidth=0.6)
    axis.plot(origin["x"], origin["y"], "o", color="black", label="nothing done", zorder=4)
    for number, name in enumerate(names, 1):
        rows = points[points["method"] == name]
        path = pd.concat([origin.to_frame().T, rows])
        axis.plot(
            path["x"].astype(float), path["y"].astype(float), linewidth=1.0, markersize=4, markevery=slice(1, None),
            label=f"{number}  {style.title(name, name)}", **looks[name],
        )  # fmt: skip
        for _, row in rows[rows.index.isin(front)].iterrows():
            seen = {"ecolor": looks[name]["color"], "alpha": 0.4, "linewidth": 0.8, "capsize": 0}
            axis.errorbar(
                row["x"], row["y"], xerr=style.errors(row, "x"), yerr=style.errors(row, "y"), fmt="none", **seen
            )
    ends = [(number, points[points["method"] == name], looks[name]["color"]) for number, name in enumerate(names, 1)]
    _number(axis, [(number, rows.iloc[-1], colour) for number, rows, colour in ends if len(rows)])


def _number(axis: Axes, ends: list[tuple[int, pd.Series, str]]) -> None:
    """Write the numbers of points beside them, where no other number and no other point is."""
    axis.figure.draw_without_rendering()  # which lays the axes out
    at = axis.transData.transform(np.array([(row["x"], row["y"]) for _, row, _ in ends], dtype=float))
    scale = axis.figure.dpi / 72
    taken: list[np.ndarray] = []
    for (number, row, colour), place in zip(ends, at, strict=True):

        def middle(offset: tuple[int, int], place: np.ndarray = place) -> np.ndarray:
            return place + scale * (np.array(offset) + 4)

        def crowd(offset: tuple[int, int], place: np.ndarray = place) -> int:
            others = [*taken, *(other for other in at if other is not place)]
            return sum((abs(other - middle(offset)) < scale * np.array([11, 9])).all() for other in others)

        offset = min(BESIDE, key=crowd)
        taken.append(middle(offset))
        axis.annotate(
            f"{number}", (row["x"], row["y"]), offset, textcoords="offset points", color=colour, fontweight="bold",
            fontsize=8, path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5,
        )  # fmt: skip


def _with_seconds(frame: pd.DataFrame, claim: str, quality: str, model: str) -> pd.DataFrame:
    """Return the points of a claim with the runs' seconds an image as y."""
    points = differences(frame, claim, quality, model)
    seconds = of_model(frame, model, claim).drop_duplicates("run_id").set_index("run_id")["seconds"]
    return points.assign(y=seconds.reindex(points.index), y_low=np.nan, y_high=np.nan)
