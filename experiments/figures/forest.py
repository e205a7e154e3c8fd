"""What every method does to every metric."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.style import errors, legend_below, look, new_figure, styled, title
from experiments.pages import arrow, change, run_labels
from experiments.tables import direction, of_model, some_of, words


@styled
def forest(frame: pd.DataFrame, model: str) -> Figure:
    """Draw the paired differences of all metrics to the run without a method, one line a metric and run.

    Right is better. Every metric has its own scale, that of its largest interval: the numbers stand beside.

    Args:
        frame: an experiment's CSV.
        model: one of its models.

    Raises:
        ValueError: nothing of this model was compared.
    """
    part = of_model(frame, model)
    part = some_of(part[part["difference"].notna()], model, "a paired difference")
    labels, methods = run_labels(frame), list(frame["method"].unique())
    runs = part.drop_duplicates("run_id").set_index("run_id")["method"]
    metrics = list(part["metric"].unique())
    metrics.sort(key=lambda metric: part.loc[part["metric"] == metric, "primary"].isna().all())  # the tested ones first
    figure, ((axis,),) = new_figure(1, 9.2, 0.9 + (0.17 * len(runs) + 0.13) * len(metrics))
    place, ticks = 0.0, []
    for metric in metrics:
        rows = part[part["metric"] == metric]
        sign = -1 if direction(rows, metric) is False else 1
        scale = rows[["difference", "difference_low", "difference_high"]].abs().max(axis=None) or 1.0
        name = f"{words(metric)} ({arrow(rows.iloc[0])})"
        ticks.append((place + (len(rows) - 1) / 2, name, "bold" if rows["primary"].notna().any() else "normal"))
        for _, row in rows.iterrows():
            point, sides = sign * row["difference"] / scale, errors(row, "difference")[::sign] / scale
            axis.errorbar(point, place, xerr=sides, linestyle="none", **look(row["method"], methods))
            beside = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7.5, "color": "black"}
            axis.text(1.02, place, change(row), **beside)
            place += 1
        place += 0.8
        axis.axhline(place - 0.9, color="black", alpha=0.12, linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks])
    for tick, label in zip(ticks, axis.get_yticklabels(), strict=True):
        label.set_fontweight(tick[2])
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(-1.05, 1.05), ylim=(place - 0.4, -0.8), xticks=[])
    axis.set_xlabel("worse  ←  paired difference to the same noises without, every metric on its own scale  →  better")
    axis.spines["left"].set_visible(False)
    handles = {}
    for run, method in runs.items():
        name = title(labels[run], method)
        handles[name] = axis.plot([], [], linestyle="none", label=name, **look(method, methods))[0]
    legend_below(figure, handles)
    figure.suptitle(f"{model}: bars are 95 % intervals, none where not estimable; bold: tested")
    return figure
