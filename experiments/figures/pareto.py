"""What every setting does for a claim against what it costs in quality."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments.choose import chosen_run, differences, pareto_front
from experiments.figures.style import COLOURS, FAINT, TITLES, errors, named, new_figure, styled, title
from experiments.pages import run_labels


@styled
def pareto(frame: pd.DataFrame, claim: str, quality: str, model: str) -> Figure:
    """Draw what every setting does for a claim against what it costs in quality, and the front of those never beaten.

    Both as paired differences to the run without a method, which is the origin; crosses for the 95 % intervals; a star
    for the setting that `chosen_run` names.

    Args and errors: those of `experiments.choose.chosen_run`.
    """
    points = differences(frame, claim, quality, model)
    front, chosen = pareto_front(frame, claim, quality, model), chosen_run(frame, claim, quality, model)
    labels, without = run_labels(frame), points["method"] == "none"
    figure, ((axis,),) = new_figure(1, 8.6, max(4.0, 1.2 + 0.165 * len(front)))  # the legend names all of the front
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    for run, point in points.iterrows():
        seen = {"ecolor": COLOURS[1], "alpha": 0.55, "linewidth": 1.0}
        seen = seen if run in front else {"ecolor": FAINT, "alpha": 0.3, "linewidth": 0.7}
        axis.errorbar(point["x"], point["y"], xerr=errors(point, "x"), yerr=errors(point, "y"), fmt="none", **seen)
    rest = points[~points.index.isin(front) & ~without]
    axis.plot(rest["x"], rest["y"], "o", color=FAINT, markersize=4, label="beaten in both by another setting")
    line = points.loc[front]
    axis.plot(line["x"], line["y"], color=COLOURS[1], drawstyle="steps-pre", label="front: none is better in both")
    names = []
    for number, (run, point) in enumerate(line[line["method"] != "none"].iterrows(), start=1):
        names.append(f"{number}  {title(labels[run], point['method'], brief=True)}")
        axis.plot(point["x"], point["y"], "o", color=COLOURS[1], markersize=5)
        axis.annotate(
            f"{number}", (point["x"], point["y"]), (5, 5), textcoords="offset points", fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],  # legible across bars
        )  # fmt: skip
    if without.any():
        axis.plot(points["x"][without], points["y"][without], "s", color="black", label=TITLES["none"])
    margin = points["margin"].dropna()
    if len(margin):
        bound = -margin.iloc[0] * points["y_sign"].iloc[0]
        axis.axhline(bound, color=COLOURS[2], linestyle="--", linewidth=1, label="largest loss that may be chosen")
    if chosen is not None:
        point = points.loc[chosen]
        axis.plot(
            point["x"], point["y"], "*", color=COLOURS[2], markersize=14, markeredgecolor="black",
            markeredgewidth=0.5, label=f"chosen: {title(labels[chosen], point['method'], brief=True)}",
        )  # fmt: skip
    axis.set_xlabel(named(frame, claim, paired=True))
    axis.set_ylabel(named(frame, quality, paired=True))
    axis.grid()
    for text in names:
        axis.plot([], [], " ", label=text)
    figure.legend(loc="outside right upper", fontsize=7.5, handlelength=1.4)
    axis.set_title(f"{model}: paired differences to the same noises without; bars: 95 % intervals")
    return figure
