"""What every method does for its claim against what it does to quality."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.style import errors, labelled, legend_below, look, named, new_figure, styled, title


@styled
def tradeoff(frame: pd.DataFrame, claim: str = "pairwise_distance", quality: str = "clip_score") -> Figure:
    """Draw what a method is for against quality, one panel a model, crosses for the 95 % intervals.

    Args:
        frame: an experiment's CSV.
        claim: metric on the x axis, such as the experiment's primary one of diversity.
        quality: metric on the y axis.
    """
    # The suites hold more metrics, by other encoders and of other units; none of that belongs to this figure.
    frame = frame[frame["metric"].isin([claim, quality])]
    models, methods = list(frame["model"].unique()), list(frame["method"].unique())
    figure, (axes,) = new_figure(len(models), 4.2 * len(models), 3.6)
    for axis, model in zip(axes, models, strict=True):
        part = frame[frame["model"] == model]
        for _, rows in part.groupby("run_id", sort=False):
            points = rows.drop_duplicates("metric").set_index("metric")  # the first encoder's
            if claim not in points.index or quality not in points.index:
                continue
            x, y, method = points.loc[claim], points.loc[quality], rows["method"].iloc[0]
            axis.errorbar(
                x["value"], y["value"], xerr=errors(x, "value"), yerr=errors(y, "value"), linestyle="none",
                label=title(method, method), **look(method, methods),
            )  # fmt: skip
        axis.set_title(f"{model} (n = {part['n_groups'].iloc[0]} groups)")
        axis.set_xlabel(named(frame, claim))
        axis.set_ylabel(named(frame, quality))
        axis.grid()
    legend_below(figure, labelled(*axes))
    figure.suptitle(f"Scored by {', '.join(frame['encoder'].unique())}; bars: 95 % intervals")
    return figure
