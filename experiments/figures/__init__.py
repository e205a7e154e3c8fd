"""Figures, each from an experiment's CSV alone, and sheets of images.

`tradeoff` and `forest` are for single settings, `ablation` for one that was swept, `heat_map` and `pareto` for a grid;
`fronts` for many methods. Several numbers of steps are drawn apart, and one figure goes over them. `figures_for`
chooses among all of these. `image_grid` sets images side by side.
"""

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.comparisons import ablation, forest, heat_map, pareto, tradeoff
from experiments.figures.fronts import fronts
from experiments.figures.image_grid import image_grid
from experiments.tables.columns import (
    by_steps,
    filter_model,
    humanize,
    primary_pair,
    swept_settings,
    with_window,
    without_controls,
)

__all__ = ["ablation", "figures_for", "forest", "fronts", "heat_map", "image_grid", "pareto", "tradeoff"]

#: More methods than these are drawn together, and not setting by setting.
MANY = 6


def figures_for(frame: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Draw what an experiment's table calls for.

    Many methods give their fronts. A grid of two settings gives heat maps and Pareto fronts, one swept setting curves
    (of the values too, where the run without a method was swept with it), neither the trade-off and the forest of all
    metrics. Negative controls are left out. A model with several numbers of steps has these figures for each of them,
    and a figure over the number of steps, with the values of the methods that have runs at each of them.

    Args:
        frame: an experiment's CSV, with its primary metrics marked.

    Returns:
        Name, as a file's, -> figure and a sentence that says what it shows, for those who do not see it.

    Raises:
        ValueError: no metrics are marked.
    """
    frame = without_controls(frame)
    return _over_steps(frame) | _of_each_model(by_steps(frame))


def _over_steps(frame: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Draw the primary metrics over the number of steps, of methods that a model has at all its numbers of steps."""
    drawn = {}
    for model in frame["model"].unique():
        part = filter_model(frame, model)
        counts = part.groupby("method")["steps"].nunique()
        if counts.max() == 1:
            continue
        part = part[part["method"].isin(counts.index[counts == counts.max()])]
        if swept_settings(part, along="steps"):  # several settings at the same number of steps: a grid
            continue
        for metric in primary_pair(frame):
            what = f"{model}: {humanize(metric)} over the number of denoising steps, with 95 % intervals"
            drawn[f"steps_{metric}_{model}"] = (ablation(part, metric, "steps", model, paired=False), what)
    return drawn


def file_name(model: str) -> str:
    """Return a model of `by_steps` as a part of a file's name."""
    return model.replace(", ", "_").replace(" ", "_")


def _of_each_model(frame: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Draw what the table calls for of each model."""
    primary_metric, quality = pair = primary_pair(frame)
    methods = frame[frame["method"] != "none"]
    swept = {model: swept_settings(methods[methods["model"] == model]) for model in frame["model"].unique()}
    drawn: dict[str, tuple[Figure, str]] = {}
    many = {model for model in swept if methods.loc[methods["model"] == model, "method"].nunique() > MANY}
    if not any(swept.values()) and not many:
        names = f"{humanize(primary_metric)} against {humanize(quality)}"
        what = f"{names} of every method, one panel a model, with 95 % intervals"
        drawn["tradeoff"] = (tradeoff(frame, *pair), what)
    for model, names in swept.items():
        name = file_name(model)
        part = filter_model(frame, model)
        if not part["difference"].notna().any():
            continue
        if model in many:
            what = (
                f"{model}: every method's paired differences in {humanize(primary_metric)} against what they cost, "
                "each over its own setting, with 95 % intervals of those on the front"
            )
            drawn[f"fronts_{name}"] = (fronts(frame, *pair, model), what)
            continue
        over = _grid(part[part["metric"] == primary_metric], names)
        for metric in pair if over else ():
            what = f"{model}: paired difference in {humanize(metric)} over {' and '.join(over)}, one panel a window"
            drawn[f"heat_map_{metric}_{name}"] = (heat_map(frame, metric, model, over), what)
        for metric in pair if len(names) == 1 else ():
            what = f"{model}: paired difference in {humanize(metric)} over {humanize(names[0])}, with 95 % intervals"
            drawn[f"ablation_{metric}_{name}"] = (ablation(frame, metric, names[0], model), what)
            if part.loc[part["method"] == "none", "run_id"].nunique() > 1:
                what = f"{model}: {humanize(metric)} over {humanize(names[0])} of every method, with 95 % intervals"
                drawn[f"values_{metric}_{name}"] = (ablation(frame, metric, names[0], model, paired=False), what)
        if len(names) > 1:
            what = (
                f"{model}: every setting's paired differences in {humanize(primary_metric)} and {humanize(quality)}, "
                "and the front of those that are never beaten"
            )
            drawn[f"pareto_{name}"] = (pareto(frame, *pair, model), what)
        if not names:
            what = f"{model}: paired differences of all metrics to the baseline, with 95 % intervals"
            drawn[f"forest_{name}"] = (forest(frame, model), what)
    return drawn


def _grid(rows: pd.DataFrame, swept: list[str]) -> tuple[str, str] | None:
    """Return the two settings of a heat map, where a metric's runs fill at least half of it, each cell with one."""
    over = swept if len(swept) == 2 else [name for name in swept if name != "window"]
    if len(over) != 2:
        return None
    runs = with_window(rows[rows["difference"].notna()])[[*over, "window"]]
    runs = runs[runs[over].notna().all(axis=1)]
    cells = runs[over[0]].nunique() * runs[over[1]].nunique() * (1 if "window" in over else runs["window"].nunique())
    return None if runs.duplicated().any() or 2 * len(runs) < cells else (over[0], over[1])
