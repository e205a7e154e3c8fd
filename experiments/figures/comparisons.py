"""Figures of an experiment's table: how methods and their settings change metrics.

In each function, `frame` is the experiment's CSV and `model` one of its models. A ValueError names the models and
metrics of the table if it lacks the requested ones.
"""

from typing import Any

import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import style
from experiments.figures.labels import Label, put_beside
from experiments.tables.columns import (
    DIFFERENCE,
    SETTING,
    UNSET,
    direction,
    filter_model,
    format_setting,
    humanize,
    require_rows,
    swept_settings,
    with_window,
)
from experiments.tables.pages import arrow, change, is_clear, run_labels, title_of
from experiments.tables.selection import differences, pareto_front, select_run

#: Better and worse: blue and red, white where nothing changed.
DIVERGING = "RdBu"


@style.styled
def tradeoff(frame: pd.DataFrame, primary_metric: str = "pairwise_distance", quality: str = "clip_score") -> Figure:
    """Draw what a method is for against quality, one panel a model, crosses for the 95 % intervals.

    Args:
        primary_metric: metric on the x axis, such as the experiment's primary one of diversity.
        quality: metric on the y axis.

    Raises:
        ValueError: the table has no such metric.
    """
    for metric in (primary_metric, quality):
        direction(frame, metric)
    # The suites hold more metrics, by other encoders and of other units; none of that belongs to this figure.
    frame = frame[frame["metric"].isin([primary_metric, quality]) & frame["value"].notna()]
    models, methods = list(frame["model"].unique()), list(frame["method"].unique())
    figure, axes = style.panels(len(models), 4.2, 3.6)
    for axis, model in zip(axes, models, strict=True):
        part = frame[frame["model"] == model]
        for _, rows in part.groupby("run_id", sort=False):
            points = rows.drop_duplicates("metric").set_index("metric")  # the first encoder's
            if primary_metric not in points.index or quality not in points.index:
                continue
            x, y, method = points.loc[primary_metric], points.loc[quality], rows["method"].iloc[0]
            axis.errorbar(
                x["value"], y["value"], xerr=style.errors(x, "value"), yerr=style.errors(y, "value"), linestyle="none",
                label=style.title(method, method), **style.look(method, methods),
            )  # fmt: skip
        count = f"n = {part['n_groups'].iloc[0]} groups"
        axis.set_title(f"{model} ({count})")
        style.name_axes(axis, style.named(frame, primary_metric), style.named(frame, quality))
        axis.grid()
    style.legend_below(figure, *axes)
    style.head(figure, f"Scored by {', '.join(frame['encoder'].unique())}; bars: 95 % intervals")
    return figure


@style.styled
def forest(frame: pd.DataFrame, model: str) -> Figure:
    """Draw the paired differences of all metrics to the run without a method, one line a metric and run.

    Right is better. Every metric has its own scale, that of its largest interval: the numbers stand beside.
    """
    part = filter_model(frame, model)
    part = require_rows(part[part["difference"].notna()], model, "a paired difference")
    labels, methods = run_labels(frame), list(frame["method"].unique())
    runs = part.drop_duplicates("run_id").set_index("run_id")["method"]
    metrics = list(part["metric"].unique())
    metrics.sort(key=lambda metric: part.loc[part["metric"] == metric, "primary"].isna().all())  # the tested ones first
    tight = (style.fixed_width() or 9.2) < 6.4 * style.scale()
    least = 2 if tight else 1  # lines of a metric: its name takes two
    figure, (axis,) = style.panels(1, 9.2, 1.0)
    figure.set_figheight(style.scale() * (0.9 + (0.17 * max(len(runs), least) + 0.13) * len(metrics)))
    place, ticks = 0.0, []  # of each metric: where it stands, what it is called, and how heavily
    for metric in metrics:
        rows = part[part["metric"] == metric]
        sign = -1 if direction(rows, metric) is False else 1
        scale = rows[DIFFERENCE].abs().max(axis=None) or 1.0
        spare = max(least - len(rows), 0) / 2
        place += spare
        name = f"{humanize(metric)} ({arrow(rows.iloc[0])})"
        name = style.wrapped(name, figure.get_figwidth() / 3)
        ticks.append((place + (len(rows) - 1) / 2, name, "bold" if rows["primary"].notna().any() else "normal"))
        for _, row in rows.iterrows():
            point, sides = sign * row["difference"] / scale, style.errors(row, "difference")[::sign] / scale
            axis.errorbar(point, place, xerr=sides, linestyle="none", **style.look(row["method"], methods))
            beside = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": "small", "color": "black"}
            # Bars tell the interval, too, where there is no room for it.
            axis.text(1.02, place, change(row).split(" [")[0] if tight else change(row), **beside)
            place += 1
        place += 0.8 + spare
        axis.axhline(place - 0.9, color="black", alpha=0.12, linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    places, names, weights = zip(*ticks, strict=True)
    axis.set_yticks(places, names)
    for label, weight in zip(axis.get_yticklabels(), weights, strict=True):
        label.set_fontweight(weight)
    axis.tick_params(axis="y", length=0)
    meaning = "worse  ←  paired difference to the baseline, every metric on its own scale  →  better"
    meaning = style.wrapped(meaning, 0.7 * figure.get_figwidth())
    axis.set(xlim=(-1.05, 1.05), ylim=(place - 0.4, -0.8), xticks=[], xlabel=meaning)
    axis.spines["left"].set_visible(False)
    for run, method in runs.items():
        axis.plot([], [], linestyle="none", label=style.title(labels[run], method), **style.look(method, methods))
    style.legend_below(figure, axis)
    style.head(figure, f"{model}: bars are 95 % intervals, none where not estimable; bold: tested")
    return figure


@style.styled
def ablation(frame: pd.DataFrame, metric: str, over: str, model: str, paired: bool = True) -> Figure:
    """Draw a metric over one setting, with the 95 % interval as a band; one line for each choice of the others.

    Args:
        metric: what is drawn.
        over: the setting: a column of the CSV such as `alpha`, `threshold`, `guidance_scale`, `matching` or `method`,
            or `window` for t_high and t_low together. Numbers make curves, anything else points side by side.
        paired: whether the paired difference to the run without a method is drawn, or the value itself.
    """
    part = with_window(filter_model(frame, model, metric))
    part = part.sort_values(["t_high", "t_low"], ascending=False, kind="stable", na_position="first")
    if over not in part:
        raise ValueError(f"expected a setting of the table ({', '.join(SETTING)}) or window, got {over!r}")
    value = "difference" if paired else "value"
    low, high = style.bounds(value)
    without = part["method"] == "none"
    # Without a method there is no choice of the method's settings: the value is one level under all of them.
    level = part[without & (part[over].isna() | (over == "window"))]
    moved = part[part[value].notna() & ~(without & paired) & ~part.index.isin(level.index)]
    require_rows(moved, model, f"a {value} of {metric}")
    others = swept_settings(moved, along=over)
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
            x = rows[over].map(lambda choice: places[format_setting(choice, UNSET)]) + shift
            axis.errorbar(x, rows[value], yerr=style.errors(rows, value), linestyle="none", **drawn)
    if paired:
        axis.axhline(0, color="black", linewidth=0.8)
    elif len(level):
        axis.axhline(level[value].iloc[0], color="black", linewidth=0.8, label=title_of("none"))
        axis.axhspan(level[low].iloc[0], level[high].iloc[0], color="black", alpha=0.08, linewidth=0)
    noun = "paired differences to the baseline" if paired else "values"
    style.entitle(axis, f"{model}: {noun}; 95 % intervals", figure.get_figwidth())
    axis.set(xlabel=humanize(over), ylabel=style.named(frame, metric, paired, separator="\n"))
    if handles := style.labelled(axis):
        if others and style.fixed_width() is None:
            figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
        else:
            style.legend_below(figure, axis, size=7.5 / style.TEXT)
    return figure


def _over(choices: pd.Series, legend_beside: bool) -> tuple[Figure, Axes, dict[str, int] | None]:
    """Return a figure, its axis over a setting and, unless that is of numbers, where each choice of it stands."""
    room, places = 2.8 * legend_beside, None
    if pd.api.types.is_numeric_dtype(choices):
        figure, (axis,) = style.panels(1, 5.2 + room, 3.4)
        measured = sorted(choices.unique())
        if len(measured) <= 8:
            axis.set_xticks(measured, map(format_setting, measured))  # where it was measured, and nowhere else
    else:
        places = {
            name: place for place, name in enumerate(dict.fromkeys(format_setting(choice, UNSET) for choice in choices))
        }
        lines = [title_of(name).replace(", ", ",\n").replace("+", "+\n") for name in places]
        letters = max(len(line) for text in lines for line in text.split("\n"))
        figure, (axis,) = style.panels(1, max(5.2, 0.8 + (0.15 + 0.075 * letters) * len(places)) + room, 3.4)
        if width := style.fixed_width():
            each = 0.8 * width / len(places)
            lines = [style.wrapped(text.replace("_", "_ "), each).replace("_ ", "_") for text in lines]
        axis.set_xticks(range(len(places)), lines)
        axis.set_xlim(-0.6, len(places) - 0.4)
    if style.fixed_width():  # lower by what is narrower, and no less
        figure.set_figheight(max(figure.get_figheight(), 2.2))
    axis.grid(axis="y" if places else "both")
    return figure, axis, places


def _choice(setting: str, value: Any) -> str:
    return title_of(value) if setting == "method" else f"{humanize(setting)} {format_setting(value, UNSET)}"


@style.styled
def heat_map(frame: pd.DataFrame, metric: str, model: str, over: tuple[str, str] = ("alpha", "threshold")) -> Figure:
    """Draw a metric's paired differences over two settings, one panel a window of timesteps.

    Blue is better than without, red is worse; numbers are the difference and its 95 % interval, bold where that
    excludes 0.

    Args:
        frame: of one method over a grid of the two settings and the window, one run a cell.
        metric: what is drawn.
        over: the settings of the rows and of the columns: columns of the CSV, or `window` for t_high and t_low
            together, which makes one panel.
    """
    rows = with_window(filter_model(frame, model, metric))
    if missing := set(over) - set(rows):
        raise ValueError(f"expected two settings of the table or window, got {over}: it lacks {sorted(missing)}")
    rows = rows[rows[[*over]].notna().all(axis=1) & rows["difference"].notna()]
    require_rows(rows, model, f"a paired difference over {' and '.join(over)}")
    if rows.duplicated([*over, "window"]).any():
        raise ValueError(
            f"expected one run for every {', '.join(dict.fromkeys([*over, 'window']))}, got several: choose one method "
            "and one value of every other setting of the table first"
        )
    rows = rows.sort_values(["t_high", "t_low"], ascending=False, kind="stable")
    windows = [None] if "window" in over else list(rows["window"].unique())
    down, across = (list(rows[name].unique()) for name in over)
    down, across = (sorted(ticks) if pd.api.types.is_number(ticks[0]) else ticks for ticks in (down, across))
    down = down[::-1] if over[0] != "window" else down
    higher = direction(frame, metric)
    limit = rows["difference"].abs().max() or 1.0
    names = [style.wrapped(name, 1.1) if style.fixed_width() else name for name in map(format_setting, down)]
    figure, axes, broken = _heated(len(windows), len(across), names)
    for axis, window in zip(axes, windows, strict=True):
        here = rows[(rows["window"] == window) | (window is None)]
        table = here.pivot(index=over[0], columns=over[1], values="difference").reindex(down, columns=across)
        colours = DIVERGING if higher is not False else f"{DIVERGING}_r"
        image = axis.imshow(table.to_numpy(dtype=float), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        for _, row in here.iterrows():
            text = change(row).replace(" [", "\n[")
            axis.text(
                across.index(row[over[1]]), down.index(row[over[0]]), text.replace(", ", ",\n") if broken else text,
                ha="center", va="center", fontsize="small", fontweight="bold" if is_clear(row) else "normal",
                color="white" if abs(row["difference"]) > 0.62 * limit else "black",
            )  # fmt: skip
        axis.set_xticks(range(len(across)), map(format_setting, across))
        axis.set_yticks(range(len(down)), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(title="" if window in (None, UNSET) else f"timesteps {window}", xlabel=humanize(over[1]))
        axis.set_ylabel(humanize(over[0]) if axis.get_subplotspec().is_first_col() else "")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("" if higher is None else "blue: better")
    title = (
        f"{model}: paired {style.named(frame, metric, paired=True)}",
        "with its 95 % interval; bold where that excludes 0",
    )
    figure.suptitle("\n".join(style.wrapped(line, figure.get_figwidth()) for line in title))
    return figure


def _heated(windows: int, cells: int, names: list[str]) -> tuple[Figure, list[Axes], bool]:
    """Return a figure for cells of numbers, its axes, and whether an interval takes two lines in it.

    Args:
        windows: panels.
        cells: of a panel, side by side.
        names: of a panel's rows.
    """
    inch = style.scale()
    beside = inch * (0.2 + 0.075 * max(len(line) for name in names for line in name.split("\n")))
    bar, width, broken = inch * 1.1, inch * 1.15, False
    total = style.fixed_width() or max(bar + windows * (beside + cells * width), 4.6)  # the title's width
    if bar + beside + cells * width > total:
        width, broken = (total - bar - beside) / cells, True
    columns = max(1, min(windows, int((total - bar) / (beside + cells * width) + 1e-6)))
    lines = -(-windows // columns)
    height = 0.5 * inch + lines * inch * (0.9 + (0.7 if broken else 0.55) * len(names))
    figure = style.Drawing(figsize=(total, height), layout="constrained")
    return figure, style.subplots(figure, lines, columns, windows), broken


@style.styled
def pareto(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> Figure:
    """Draw the gain of every setting against its loss of quality, and the Pareto front.

    Both as paired differences to the run without a method, which is the origin; crosses for the 95 % intervals; a star
    for the setting that `experiments.tables.selection.select_run` names.
    """
    points = differences(frame, primary_metric, quality, model)
    front, chosen = (
        pareto_front(frame, primary_metric, quality, model),
        select_run(frame, primary_metric, quality, model),
    )
    labels, without = run_labels(frame), points["method"] == "none"
    mark = rcParams["lines.markersize"]
    # The legend names all of the front, beside it where there is room.
    beside = style.fixed_width() is None
    figure, (axis,) = style.panels(1, 8.6 if beside else 4.6, max(4.0, 1.2 + 0.165 * len(front)) if beside else 4.0)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    for run, point in points.iterrows():
        seen = {"ecolor": style.COLOURS[1], "alpha": 0.4} if run in front else {"ecolor": style.FAINT, "alpha": 0.3}
        axis.errorbar(
            point["x"], point["y"], xerr=style.errors(point, "x"), yerr=style.errors(point, "y"), fmt="none",
            linewidth=0.8, capsize=0, **seen,
        )  # fmt: skip
    rest = points[~points.index.isin(front) & ~without]
    axis.plot(
        rest["x"], rest["y"], "o", color=style.FAINT, markersize=0.8 * mark, label="beaten in both by another setting"
    )
    line = points.loc[front]
    axis.plot(
        line["x"], line["y"], color=style.COLOURS[1], drawstyle="steps-pre", label="front: none is better in both"
    )
    named = line[line["method"] != "none"]
    axis.plot(named["x"], named["y"], "o", color=style.COLOURS[1])
    if without.any():
        axis.plot(points["x"][without], points["y"][without], "s", color="black", label=title_of("none"))
    margin = points["margin"].dropna()
    if len(margin):
        bound = -margin.iloc[0] * points["y_sign"].iloc[0]
        axis.axhline(
            bound, color=style.COLOURS[2], linestyle="--", linewidth=1, label="largest loss that may be chosen"
        )
    if chosen is not None:
        point = points.loc[chosen]
        axis.plot(
            point["x"], point["y"], "*", color=style.COLOURS[2], markersize=2.8 * mark, markeredgecolor="black",
            markeredgewidth=0.5, zorder=3, label=f"chosen: {style.title(labels[chosen], point['method'], brief=True)}",
        )  # fmt: skip
    style.name_axes(axis, style.named(frame, primary_metric, paired=True), style.named(frame, quality, paired=True))
    axis.grid()
    labels_of_front = []
    for number, (run, point) in enumerate(named.iterrows(), start=1):
        axis.plot([], [], " ", label=f"{number}  {style.title(labels[run], point['method'], brief=True)}")
        labels_of_front.append(Label(f"{number}", (point["x"], point["y"]), "black"))
    if beside:
        figure.legend(loc="outside right upper", fontsize="small", handlelength=1.4)
    else:
        style.legend_below(figure, axis, size=7.5 / style.TEXT)
    style.entitle(axis, f"{model}: paired differences to the baseline; bars: 95 % intervals", 5.4)
    put_beside(axis, labels_of_front, "medium")
    return figure
