"""What one setting does."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import style
from experiments.tables import SETTING, UNSET, of_model, some_of, spelled, swept_settings, with_window, words


@style.styled
def ablation(frame: pd.DataFrame, metric: str, over: str, model: str, paired: bool = True) -> Figure:
    """Draw a metric over one setting, with the 95 % interval as a band; one line for each choice of the others.

    Args:
        frame: an experiment's CSV.
        metric: what is drawn.
        over: the setting: a column of the CSV such as `alpha`, `threshold`, `guidance_scale`, `matching` or `method`,
            or `window` for t_high and t_low together. Numbers make curves, anything else points side by side.
        model: one of the CSV's models.
        paired: whether the paired difference to the run without a method is drawn, or the value itself.

    Raises:
        ValueError: the table lacks the model, the metric or the setting, or nothing was compared.
    """
    part = with_window(of_model(frame, model, metric))
    part = part.sort_values(["t_high", "t_low"], ascending=False, kind="stable", na_position="first")
    if over not in part:
        raise ValueError(f"expected a setting of the table ({', '.join(SETTING)}) or window, got {over!r}")
    value = "difference" if paired else "value"
    low, high = style.bounds(value)
    without = part["method"] == "none"
    # Without a method there is no choice of the method's settings: the value is one level under all of them.
    level = part[without & (part[over].isna() | (over == "window"))]
    moved = part[part[value].notna() & ~(without & paired) & ~part.index.isin(level.index)]
    some_of(moved, model, f"a {value} of {metric}")
    others = [name for name in swept_settings(moved) if name != over]
    if over not in ("method", "matching") and moved["method"].nunique() > 1:
        others.insert(0, "method")
    figure, axis, places = _over(moved[over], legend_beside=bool(others))
    methods, groups = list(frame["method"].unique()), moved.groupby(others or ["method"], sort=False, dropna=False)
    for number, (key, rows) in enumerate(groups):
        cycle, place = divmod(number, len(style.COLOURS) - 1)
        # Black is without a method.
        drawn = style.look(key[0], methods) if others in ([], ["method"]) else style.numbered(place + 1)
        drawn["label"] = ", ".join(map(_choice, others, key)) or None
        if places is None:
            rows = rows.sort_values(over)
            axis.plot(rows[over], rows[value], ("-", "--", ":", "-.")[cycle % 4], **drawn)
            axis.fill_between(rows[over], rows[low], rows[high], alpha=0.15, linewidth=0, color=drawn["color"])
        else:
            shift = (number - (len(groups) - 1) / 2) * min(0.5 / len(groups), 0.15) if others else 0
            x = rows[over].map(lambda choice: places[spelled(choice, UNSET)]) + shift
            axis.errorbar(x, rows[value], yerr=style.errors(rows, value), linestyle="none", **drawn)
    if paired:
        axis.axhline(0, color="black", linewidth=0.8)
    elif len(level):
        axis.axhline(level[value].iloc[0], color="black", linewidth=0.8, label=style.TITLES["none"])
        axis.axhspan(level[low].iloc[0], level[high].iloc[0], color="black", alpha=0.08, linewidth=0)
    axis.set_xlabel(words(over))
    axis.set_ylabel(style.named(frame, metric, paired, separator="\n"))
    if handles := style.labelled(axis):
        place = "outside right upper" if others else "outside lower center"
        figure.legend(handles.values(), handles.keys(), loc=place, fontsize=7.5)
    noun = "paired differences to the same noises without" if paired else "values"
    axis.set_title(f"{model}: {noun}; 95 % intervals")
    return figure


def _over(choices: pd.Series, legend_beside: bool) -> tuple[Figure, Axes, dict[str, int] | None]:
    """Return a figure, its axis over a setting and, unless that is of numbers, where each choice of it stands."""
    room, places = 2.8 * legend_beside, None
    if pd.api.types.is_numeric_dtype(choices):
        figure, ((axis,),) = style.new_figure(1, 5.2 + room, 3.4)
        measured = sorted(choices.unique())
        if len(measured) <= 8:
            axis.set_xticks(measured, map(spelled, measured))  # where it was measured, and nowhere else
    else:
        places = {name: place for place, name in enumerate(dict.fromkeys(spelled(choice, UNSET) for choice in choices))}
        lines = [style.TITLES.get(name, name).replace(", ", ",\n").replace("+", "+\n") for name in places]
        letters = max(len(line) for text in lines for line in text.split("\n"))
        figure, ((axis,),) = style.new_figure(1, max(5.2, 0.8 + (0.15 + 0.075 * letters) * len(places)) + room, 3.4)
        axis.set_xticks(range(len(places)), lines)
        axis.set_xlim(-0.6, len(places) - 0.4)
    axis.grid(axis="y" if places else "both")
    return figure, axis, places


def _choice(setting: str, value: Any) -> str:
    return style.TITLES.get(value, value) if setting == "method" else f"{words(setting)} {spelled(value, UNSET)}"
