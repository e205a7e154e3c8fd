"""Act 4: an experiment's table and images become its figures.

    python -m experiments.plot experiment=diversity

All figures but `image_grid` are drawn from the CSV alone: `tradeoff` and `forest` for single settings, `ablation` for
one that was swept, `heat_map` and `pareto` for a grid; `figures` chooses among them. `image_grid` sets the same groups,
from the same noises, side by side for every method. The notebooks and the report call these functions.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont

from eval.files import write_bytes
from eval.images import group_rows, load_picture, read_manifest
from experiments import project_path
from experiments.assets import read_assets
from experiments.configs import expand
from experiments.pages import change, findings, main_table, run_labels
from experiments.runs import Run, canonical
from experiments.tables import ROLES, SETTING, commands, printed_window, read_table

#: How a method is called in figures where its name in folders is too terse.
TITLES = {
    "none": "without NegToMe",
    "negtome": "NegToMe",
    "negtome_released": "NegToMe, released matching",
    "negative_prompt": "negative prompt",
    "negtome_reference": "NegToMe from the asset",
    "negtome_and_negative_prompt": "NegToMe from the asset and negative prompt",
    "negtome_reference_released": "NegToMe from the asset, released way",
    "negative_ip_adapter": "negative IP-Adapter",
    "random_match": "control: random match",
    "noise_control": "control: noise of equal norm",
}
#: Okabe and Ito's palette, told apart with any colour vision, and a shape each for print without colours.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
#: Which of them a method keeps in every figure, by number; black is for the run without any.
LOOKS = {
    "none": 0,
    "negtome": 1,
    "negtome_released": 2,
    "negative_prompt": 3,
    "negtome_reference": 4,
    "negtome_and_negative_prompt": 5,
    "negtome_reference_released": 6,
    "negative_ip_adapter": 7,
    # Never in one table with those who look alike.
    "random_match": 3,
    "noise_control": 4,
}
#: Kept in every file: text stays text in a PDF, and the same numbers give the same bytes.
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5.0,
    "errorbar.capsize": 2.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "negtome",
    "savefig.dpi": 150,
}
#: Better and worse, in heat maps: blue and red, white where nothing changed.
DIVERGING = "RdBu"
#: Of points that are not to be looked at first.
FAINT = "#8C8C8C"
#: Kinds of files that figures are written as, and what would make them differ from day to day.
METADATA: dict[str, dict[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Drawing(Figure):
    """A figure that a notebook shows by itself: no pyplot, hence no state to close and no backend to choose."""

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


def encode(figure: Figure, kind: str) -> bytes:
    """Return the figure as a file of `kind`, one of png, pdf and svg; the same figure gives the same bytes."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format=kind, metadata=METADATA[kind])
    return file.getvalue()


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as a vector PDF and as a PNG; `path` has no suffix. Returns the two files."""
    files = []
    for kind in ("png", "pdf"):
        files.append(write_bytes(path.with_name(f"{path.name}.{kind}"), encode(figure, kind)))
    return files


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a sheet of images as a PNG of 256 colours; returns the file."""
    file = io.BytesIO()
    sheet.quantize(256).save(file, format="png", optimize=True)
    return write_bytes(path, file.getvalue())


def _panels(columns: int, width: float, height: float, rows: int = 1) -> tuple[Drawing, Any]:
    """Return a figure of `width` x `height` inches and its axes [rows, columns]."""
    figure = Drawing(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _look(method: str, methods: list[str]) -> dict[str, str]:
    """Return a method's colour and shape; methods unknown here take what the others of `methods` leave."""
    taken = {LOOKS[name] for name in methods if name in LOOKS} | {0}
    free = [place for place in range(len(COLOURS)) if place not in taken] or list(range(1, len(COLOURS)))
    others = [name for name in methods if name not in LOOKS]
    return _place(LOOKS[method] if method in LOOKS else free[others.index(method) % len(free)])


def _place(number: int) -> dict[str, str]:
    return {"color": COLOURS[number], "marker": MARKERS[number]}


def _legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Put a legend, label -> handle, below the axes, which keep their height, in as many columns as have room."""
    column = 0.45 + 0.075 * max(map(len, handles), default=0)  # inches: the mark, and letters of the style's size
    columns = min(max(int(figure.get_figwidth() / column), 1), len(handles) or 1)
    figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _better(higher: Any) -> str:
    return {True: "higher is better", False: "lower is better"}.get(higher, "neither is better")


def _direction(frame: pd.DataFrame, metric: str) -> Any:
    """Return whether higher values of a metric are better: True, False, or None where neither is."""
    higher = frame.loc[frame["metric"] == metric, "higher_is_better"].iloc[0]
    return None if pd.isna(higher) else str(higher) == "True"


def _of_model(frame: pd.DataFrame, model: str, *metrics: str) -> pd.DataFrame:
    """Return a model's rows of some metrics (none named: of all).

    Raises:
        ValueError: the table does not have this model or one of the metrics.
    """
    part = frame[frame["model"] == model]
    if part.empty:
        raise ValueError(f"expected a model of the table ({', '.join(frame['model'].unique())}), got {model!r}")
    for metric in metrics:
        if metric not in set(part["metric"]):
            raise ValueError(
                f"expected a metric of {model} in the table ({', '.join(part['metric'].unique())}), got {metric!r}"
            )
    return part[part["metric"].isin(metrics)] if metrics else part


def _errors(row: pd.Series, value: str, low: str, high: str) -> list[list[float]]:
    """Return an interval as matplotlib wants it, of no length where it is not estimable."""
    if pd.isna(row[low]):
        return [[0.0], [0.0]]
    # Rounding of the table may put the value outside by a last digit.
    return [[max(row[value] - row[low], 0.0)], [max(row[high] - row[value], 0.0)]]


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
    with rc_context(STYLE):
        figure, axes = _panels(len(models), 4.2 * len(models), 3.6)
        for axis, model in zip(axes[0], models, strict=True):
            part = frame[frame["model"] == model]
            for _, rows in part.groupby("run_id", sort=False):
                points = rows.drop_duplicates("metric").set_index("metric")  # the first encoder's
                if claim not in points.index or quality not in points.index:
                    continue
                x, y, method = points.loc[claim], points.loc[quality], rows["method"].iloc[0]
                axis.errorbar(
                    x["value"], y["value"], xerr=_errors(x, "value", "ci_low", "ci_high"),
                    yerr=_errors(y, "value", "ci_low", "ci_high"), linestyle="none",
                    label=TITLES.get(method, method), **_look(method, methods),
                )  # fmt: skip
            axis.set_title(f"{model} (n = {part['n_groups'].iloc[0]} groups)")
            for metric, put in ((claim, axis.set_xlabel), (quality, axis.set_ylabel)):
                put(f"{_words(metric)}, {_better(_direction(frame, metric))}")
            axis.grid()
        labelled = dict(
            pair for axis in axes[0] for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
        )
        _legend_below(figure, labelled)
        figure.suptitle(f"Scored by {', '.join(frame['encoder'].unique())}; bars: 95 % intervals")
    return figure


def forest(frame: pd.DataFrame, model: str) -> Figure:
    """Draw the paired differences of all metrics to the run without a method, one line a metric and run.

    Right is better. Every metric has its own scale, that of its largest interval: the numbers stand beside.

    Args:
        frame: an experiment's CSV.
        model: one of its models.

    Raises:
        ValueError: nothing of this model was compared.
    """
    part = _of_model(frame, model)
    part = part[part["difference"].notna()]
    if part.empty:
        raise ValueError(f"expected runs of {model} with a paired difference, got none: tabulate them with method=none")
    labels, methods = run_labels(frame), list(frame["method"].unique())
    runs = list(part["run_id"].unique())
    metrics = list(part["metric"].unique())
    metrics.sort(key=lambda metric: part.loc[part["metric"] == metric, "primary"].isna().all())  # the tested ones first
    with rc_context(STYLE):
        figure, axes = _panels(1, 9.2, 0.9 + (0.17 * len(runs) + 0.13) * len(metrics))
        axis = axes[0][0]
        place, ticks = 0.0, []
        for metric in metrics:
            rows = part[part["metric"] == metric]
            sign = -1 if _direction(rows, metric) is False else 1
            scale = rows[["difference", "difference_low", "difference_high"]].abs().max(axis=None) or 1.0
            ticks.append((place + (len(rows) - 1) / 2, metric, rows["primary"].notna().any(), _direction(rows, metric)))
            for _, row in rows.iterrows():
                look = _look(row["method"], methods)
                error = _errors(row, "difference", "difference_low", "difference_high")
                axis.errorbar(
                    sign * row["difference"] / scale, place, linestyle="none",
                    xerr=[[side[0] / scale] for side in (error if sign > 0 else error[::-1])], **look,
                )  # fmt: skip
                axis.text(
                    1.02, place, change(row), transform=axis.get_yaxis_transform(), va="center", fontsize=7.5,
                    color="black",
                )  # fmt: skip
                place += 1
            place += 0.8
            axis.axhline(place - 0.9, color="black", alpha=0.12, linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks([tick[0] for tick in ticks], [_tick(tick[1], tick[3]) for tick in ticks])
        for tick, label in zip(ticks, axis.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if tick[2] else "normal")
        axis.tick_params(axis="y", length=0)
        axis.set(xlim=(-1.05, 1.05), ylim=(place - 0.4, -0.8), xticks=[])
        axis.set_xlabel(
            "worse  ←  paired difference to the same noises without, every metric on its own scale  →  better"
        )
        axis.spines["left"].set_visible(False)
        handles = {}
        for run in runs:
            method = part.loc[part["run_id"] == run, "method"].iloc[0]
            title = TITLES.get(labels[run], labels[run])
            handles[title] = axis.plot([], [], linestyle="none", label=title, **_look(method, methods))[0]
        _legend_below(figure, handles)
        figure.suptitle(f"{model}: bars are 95 % intervals, none where not estimable; bold: tested")
    return figure


def _tick(metric: str, higher: Any) -> str:
    direction = {True: "up", False: "down"}.get(higher, "-")
    return f"{_words(metric)} ({direction})"


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
    part = _of_model(frame, model, metric)
    part = part.assign(window=[printed_window(row, "as configured") for _, row in part.iterrows()])
    part = part.sort_values(["t_high", "t_low"], ascending=False, kind="stable", na_position="first")
    if over not in part:
        raise ValueError(f"expected a setting of the table ({', '.join(SETTING)}) or window, got {over!r}")
    value, low, high = ("difference", "difference_low", "difference_high") if paired else ("value", "ci_low", "ci_high")
    moved = part[(part["method"] != "none") | (not paired)]
    level = moved[(moved["method"] == "none") & (moved[over].isna() | (over == "window"))]
    moved = moved[moved[value].notna() & ~moved.index.isin(level.index)]
    if moved.empty:
        raise ValueError(
            f"expected runs of {model} with a {value} of {metric}, got none: tabulate them with method=none"
        )
    # The bounds of the window are one setting, and what a method brings along is none beside it.
    names = [name for name in [*SETTING, "window"] if name not in (over, "model", "method", "t_low", "t_high")]
    counts = moved.groupby("method")[names].nunique(dropna=False)
    others = [name for name, count in counts.max().items() if count > 1]
    if over not in ("method", "matching") and moved["method"].nunique() > 1:
        others.insert(0, "method")
    numeric = pd.api.types.is_numeric_dtype(moved[over])
    names = list(dict.fromkeys(moved[over].map(_spelled)))
    groups = list(moved.groupby(others, sort=False, dropna=False)) if others else [((), moved)]
    with rc_context(STYLE):
        # Room for the names below the data, and for the legend beside it, where there are any.
        lines = [TITLES.get(name, name).replace(", ", ",\n").replace("+", "+\n") for name in names]
        letters = max(len(line) for text in lines for line in text.split("\n"))
        width = 5.2 if numeric else max(5.2, 0.8 + (0.15 + 0.075 * letters) * len(names))
        figure, axes = _panels(1, width + 2.8 * bool(others), 3.4)
        axis = axes[0][0]
        for number, (key, rows) in enumerate(groups):
            cycle, place = divmod(number, len(COLOURS) - 1)
            look = _place(place + 1)  # not black, which is the run without a method
            if others == ["method"]:
                look = _look(key[0], list(frame["method"].unique()))
            label = ", ".join(_named(name, one) for name, one in zip(others, key, strict=True))
            if numeric:
                rows = rows.sort_values(over)
                line = ("-", "--", ":", "-.")[cycle % 4]
                axis.plot(rows[over], rows[value], line, label=label or None, **look)
                axis.fill_between(rows[over], rows[low], rows[high], alpha=0.15, linewidth=0, color=look["color"])
                continue
            shift = (number - (len(groups) - 1) / 2) * min(0.5 / len(groups), 0.15)
            for _, row in rows.iterrows():
                name = _spelled(row[over])
                if over in ("method", "matching") and not others:
                    look = _look(row["method"], list(frame["method"].unique()))
                axis.errorbar(
                    names.index(name) + shift, row[value], yerr=_errors(row, value, low, high), linestyle="none",
                    label=label or None, **look,
                )  # fmt: skip
        if paired:
            axis.axhline(0, color="black", linewidth=0.8)
        elif len(level):
            axis.axhline(level[value].iloc[0], color="black", linewidth=0.8, label=TITLES["none"])
            axis.axhspan(level[low].iloc[0], level[high].iloc[0], color="black", alpha=0.08, linewidth=0)
        if not numeric:
            axis.set_xticks(range(len(names)), lines)
            axis.set_xlim(-0.6, len(names) - 0.4)
        elif moved[over].nunique() <= 8:
            measured = sorted(moved[over].unique())
            axis.set_xticks(measured, [f"{number:g}" for number in measured])  # where it was measured, and nowhere else
        axis.set_xlabel(_words(over))
        axis.set_ylabel(f"{'difference in ' if paired else ''}{_words(metric)}\n{_better(_direction(frame, metric))}")
        axis.grid(axis="both" if numeric else "y")
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if handles:
            place = "outside right upper" if others else "outside lower center"
            figure.legend(handles.values(), handles.keys(), loc=place, fontsize=7.5)
        noun = "paired differences to the same noises without" if paired else "values"
        axis.set_title(f"{model}: {noun}; 95 % intervals")
    return figure


def _named(setting: str, value: Any) -> str:
    if setting == "method":
        return TITLES.get(value, value)
    return f"{_words(setting)} {_spelled(value)}"


def _spelled(value: Any) -> str:
    return "as configured" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def heat_map(frame: pd.DataFrame, metric: str, model: str) -> Figure:
    """Draw a metric's paired differences over alpha and threshold, one panel a window of timesteps.

    Blue is better than without, red is worse; numbers are the difference and its 95 % interval, bold where that
    excludes 0.

    Args:
        frame: an experiment's CSV, of one method over a grid of alpha, threshold and window.
        metric: what is drawn.
        model: one of the CSV's models.

    Raises:
        ValueError: the table lacks the model or the metric, nothing was compared, or a cell has several runs.
    """
    rows = _of_model(frame, model, metric)
    rows = rows[rows["alpha"].notna() & rows["threshold"].notna() & rows["difference"].notna()]
    if rows.empty:
        raise ValueError(
            f"expected runs of {model} over alpha and threshold with a paired difference, got none: tabulate them with "
            "method=none"
        )
    if rows.duplicated(["alpha", "threshold", "t_low", "t_high"]).any():
        raise ValueError(
            "expected one run for every alpha, threshold and window, got several: choose one method, matching and "
            "guidance scale of the table first"
        )
    windows = rows[["t_high", "t_low"]].drop_duplicates().sort_values(["t_high", "t_low"], ascending=False)
    alphas, thresholds = sorted(rows["alpha"].unique(), reverse=True), sorted(rows["threshold"].unique())
    higher = _direction(frame, metric)
    limit = rows["difference"].abs().max() or 1.0
    with rc_context(STYLE):
        figure, axes = _panels(
            len(windows),
            max(1.3 + len(windows) * (0.45 + 1.1 * len(thresholds)), 4.6),  # the title's width
            1.4 + 0.55 * len(alphas),
        )
        for axis, (_, window) in zip(axes[0], windows.iterrows(), strict=True):
            here = rows[(rows["t_high"] == window["t_high"]) & (rows["t_low"] == window["t_low"])]
            if pd.isna(window["t_low"]):
                here = rows[rows["t_low"].isna()]
            table = here.pivot(index="alpha", columns="threshold", values="difference").reindex(
                alphas, columns=thresholds
            )
            colours = DIVERGING if higher is not False else f"{DIVERGING}_r"
            image = axis.imshow(table.to_numpy(dtype=float), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
            for _, row in here.iterrows():
                sure = row["difference_low"] > 0 or row["difference_high"] < 0
                axis.text(
                    thresholds.index(row["threshold"]), alphas.index(row["alpha"]), change(row).replace(" [", "\n["),
                    ha="center", va="center", fontsize=7.5, fontweight="bold" if sure else "normal",
                    color="white" if abs(row["difference"]) > 0.62 * limit else "black",
                )  # fmt: skip
            axis.set_xticks(range(len(thresholds)), [f"{number:g}" for number in thresholds])
            axis.set_yticks(range(len(alphas)), [f"{number:g}" for number in alphas])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"timesteps {printed_window(window, 'as configured')}")
            axis.set_xlabel("threshold")
        axes[0][0].set_ylabel("alpha")
        bar = figure.colorbar(image, ax=axes[0], pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("" if higher is None else "blue: better")
        figure.suptitle(
            f"{model}: paired difference in {_words(metric)}, {_better(higher)}\n"
            "with its 95 % interval; bold where that excludes 0"
        )
    return figure


def chosen_run(frame: pd.DataFrame, claim: str, quality: str, model: str) -> str | None:
    """Return the run id of the setting that does most for `claim` while `quality` loses no more than its margin.

    The rule by which settings are chosen on development prompts (results/README.md), on the differences themselves.

    Args:
        frame: an experiment's CSV.
        claim: metric that a method is to improve.
        quality: metric that is to be kept; its margin is in the table.
        model: one of the CSV's models.

    Returns:
        The run's id, or None where no setting fulfils it or there is no margin.
    """
    points = _differences(frame, claim, quality, model)
    points = points[points["margin"].notna() & (points["y"] * points["y_sign"] >= -points["margin"])]
    points = points[points["x"] * points["x_sign"] > 0]
    return None if points.empty else (points["x"] * points["x_sign"]).idxmax()


def pareto_front(frame: pd.DataFrame, claim: str, quality: str, model: str) -> list[str]:
    """Return the run ids of the settings that no other one beats in both metrics, by what they do for `claim`.

    Args and errors: those of `pareto`. The run without a method takes part, with no difference to itself.
    """
    points = _differences(frame, claim, quality, model)
    points = points.assign(x=points["x"] * points["x_sign"], y=points["y"] * points["y_sign"])
    points = points.sort_values(["x", "y"], ascending=False, kind="stable")
    front, best = [], float("-inf")
    for run, point in points.iterrows():
        if point["y"] > best:
            front.append(run)
            best = point["y"]
    return front[::-1]


def _differences(frame: pd.DataFrame, claim: str, quality: str, model: str) -> pd.DataFrame:
    """Return one row a run: both metrics' paired differences x and y with intervals; the baseline's are 0."""
    part = _of_model(frame, model, claim, quality)
    columns = ["difference", "difference_low", "difference_high"]
    tables = []
    for metric, name in ((claim, "x"), (quality, "y")):
        rows = part[part["metric"] == metric].drop_duplicates("run_id").set_index("run_id")
        table = rows[columns].set_axis([name, f"{name}_low", f"{name}_high"], axis="columns")
        table = table.where(rows["method"] != "none", 0.0).astype(float)
        # Of metrics that have no direction, more counts as better: there is no other way to draw a front.
        table[f"{name}_sign"] = -1 if _direction(part, metric) is False else 1
        tables.append(table)
    points = tables[0].join(tables[1], how="inner")
    rows = part[part["metric"] == quality].drop_duplicates("run_id").set_index("run_id")
    points["margin"] = rows["margin"].astype(float).reindex(points.index)
    points["method"] = rows["method"].reindex(points.index)
    points = points[points["x"].notna() & points["y"].notna()]
    if (points["method"] == "none").all():
        raise ValueError(
            f"expected runs of {model} with paired differences of {claim} and {quality}, got none: tabulate them with "
            "method=none"
        )
    return points


def pareto(frame: pd.DataFrame, claim: str, quality: str, model: str) -> Figure:
    """Draw what every setting does for a claim against what it costs in quality, and the front of those never beaten.

    Both as paired differences to the run without a method, which is the origin; crosses for the 95 % intervals; a star
    for the setting that `chosen_run` names.

    Args:
        frame: an experiment's CSV.
        claim: metric on the x axis, such as `pairwise_distance`.
        quality: metric on the y axis, such as `clip_score`.
        model: one of the CSV's models.

    Raises:
        ValueError: the table lacks the model or a metric, or nothing was compared.
    """
    points = _differences(frame, claim, quality, model)
    front, chosen = pareto_front(frame, claim, quality, model), chosen_run(frame, claim, quality, model)
    labels = run_labels(frame)
    with rc_context(STYLE):
        figure, axes = _panels(1, 8.6, max(4.0, 1.2 + 0.165 * len(front)))  # the legend names all of the front
        axis: Axes = axes[0][0]
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        for run, point in points.iterrows():
            colour = COLOURS[1] if run in front else FAINT
            axis.errorbar(
                point["x"], point["y"], xerr=_errors(point, "x", "x_low", "x_high"),
                yerr=_errors(point, "y", "y_low", "y_high"), fmt="none", ecolor=colour,
                alpha=0.55 if run in front else 0.3, linewidth=1.0 if run in front else 0.7,
            )  # fmt: skip
        rest = points[~points.index.isin(front) & (points["method"] != "none")]
        axis.plot(rest["x"], rest["y"], "o", color=FAINT, markersize=4, label="beaten in both by another setting")
        line = points.loc[front]
        axis.plot(line["x"], line["y"], color=COLOURS[1], drawstyle="steps-pre", label="front: none is better in both")
        numbered = []
        for run, point in line.iterrows():
            if point["method"] == "none":
                continue
            numbered.append(f"{len(numbered) + 1}  {labels[run].removeprefix(point['method']).strip() or labels[run]}")
            axis.plot(point["x"], point["y"], "o", color=COLOURS[1], markersize=5)
            axis.annotate(
                f"{len(numbered)}", (point["x"], point["y"]), (5, 5), textcoords="offset points", fontweight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")],  # legible across bars
            )  # fmt: skip
        nothing = points[points["method"] == "none"]
        if len(nothing):
            axis.plot(nothing["x"], nothing["y"], "s", color="black", label=TITLES["none"])
        margin = points["margin"].dropna()
        if len(margin):
            bound = -margin.iloc[0] * points["y_sign"].iloc[0]
            axis.axhline(bound, color=COLOURS[2], linestyle="--", linewidth=1, label="largest loss that may be chosen")
        if chosen is not None:
            point = points.loc[chosen]
            axis.plot(
                point["x"], point["y"], "*", color=COLOURS[2], markersize=14, markeredgecolor="black",
                markeredgewidth=0.5, label=f"chosen: {labels[chosen].removeprefix(point['method']).strip()}",
            )  # fmt: skip
        axis.set_xlabel(f"difference in {_words(claim)}, {_better(_direction(frame, claim))}")
        axis.set_ylabel(f"difference in {_words(quality)}, {_better(_direction(frame, quality))}")
        axis.grid()
        for text in numbered:
            axis.plot([], [], " ", label=text)
        figure.legend(loc="outside right upper", fontsize=7.5, handlelength=1.4)
        axis.set_title(f"{model}: paired differences to the same noises without; bars: 95 % intervals")
    return figure


def figures(frame: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Draw what an experiment's table calls for.

    A grid of alpha and threshold gives heat maps and Pareto fronts, one swept setting curves (of the values too, where
    the run without a method was swept with it), neither the trade-off and the forest of all metrics.

    Args:
        frame: an experiment's CSV, with its primary metrics marked.

    Returns:
        Name, as a file's, -> figure and a sentence that says what it shows, for those who do not see it.

    Raises:
        ValueError: no metrics are marked.
    """
    tested = frame[frame["primary"].isin(ROLES)].drop_duplicates("metric").set_index("metric")["primary"]
    claim = next((metric for metric, role in tested.items() if role != "quality"), None)
    quality = next((metric for metric, role in tested.items() if role == "quality"), None)
    if claim is None or quality is None:
        raise ValueError(f"expected a primary metric of quality and another one, got {tested.to_dict()}: tabulate anew")
    drawn: dict[str, tuple[Figure, str]] = {}
    if not any(swept_settings(frame, model) for model in frame["model"].unique()):
        what = f"{_words(claim)} against {_words(quality)} of every method, one panel a model, with 95 % intervals"
        drawn["tradeoff"] = (tradeoff(frame, claim, quality), what)
    for model in frame["model"].unique():
        part = _of_model(frame, model)
        if not part["difference"].notna().any():
            continue
        swept = swept_settings(frame, model)
        alone = not part[part["alpha"].notna() & (part["metric"] == claim)].duplicated(
            ["alpha", "threshold", "t_low", "t_high"]
        ).any()  # fmt: skip
        if {"alpha", "threshold"} <= set(swept) and alone and _is_grid(part):
            for metric in (claim, quality):
                what = f"{model}: paired difference in {_words(metric)} over alpha and threshold, one panel a window"
                drawn[f"heat_map_{metric}_{model}"] = (heat_map(frame, metric, model), what)
        elif len(swept) == 1:
            for metric in (claim, quality):
                what = f"{model}: paired difference in {_words(metric)} over {_words(swept[0])}, with 95 % intervals"
                drawn[f"ablation_{metric}_{model}"] = (ablation(frame, metric, swept[0], model), what)
                if (part["method"] == "none").groupby(part["run_id"]).any().sum() > 1:
                    what = f"{model}: {_words(metric)} over {_words(swept[0])} of every method, with 95 % intervals"
                    drawn[f"values_{metric}_{model}"] = (ablation(frame, metric, swept[0], model, paired=False), what)
        if len(swept) > 1:
            what = (
                f"{model}: every setting's paired differences in {_words(claim)} and {_words(quality)}, "
                "and the front of those that are never beaten"
            )
            drawn[f"pareto_{model}"] = (pareto(frame, claim, quality, model), what)
        if len(swept) == 0:
            what = f"{model}: paired differences of all metrics to the same noises without, with 95 % intervals"
            drawn[f"forest_{model}"] = (forest(frame, model), what)
    return drawn


@dataclass(frozen=True)
class Shown:
    """All of a table, for a notebook: findings, main table and `figures`; or what makes it, where it is not there yet.

    Args:
        name: the experiment's.
        folder: where its CSV lies; relative paths are taken from the checkout.
    """

    name: str
    folder: str | Path = "results"

    def _repr_html_(self) -> str:
        try:
            frame = read_table(self.name, self.folder)
        except FileNotFoundError:
            return f"<p>There is no table {escape(self.name)} yet: <code>{escape(commands(self.name)[0])}</code></p>"
        parts = [f"<li>{escape(finding.removeprefix('- '))}</li>" for finding in findings(frame)]
        parts = ["<ul>", *parts, "</ul>", main_table(frame).to_html(index=False, border=0)]
        for figure, words in figures(frame).values():
            image = base64.b64encode(encode(figure, "png")).decode()
            parts.append(f'<p><img alt="{escape(words)}" src="data:image/png;base64,{image}"></p>')
        return "\n".join(parts)


def _is_grid(part: pd.DataFrame) -> bool:
    """Tell whether a model's runs fill at least half of the alphas x thresholds x windows that occur in them."""
    runs = part[part["alpha"].notna()].drop_duplicates("run_id")
    windows = len(runs[["t_low", "t_high"]].drop_duplicates())
    return 2 * len(runs) >= runs["alpha"].nunique() * runs["threshold"].nunique() * windows


def swept_settings(frame: pd.DataFrame, model: str) -> list[str]:
    """Return the settings that differ among a model's runs of one method; the bounds of the window count as one."""
    part = frame[(frame["model"] == model) & (frame["method"] != "none")]
    part = part.assign(window=[printed_window(row, "as configured") for _, row in part.iterrows()])
    names = [name for name in SETTING if name not in ("model", "method", "t_low", "t_high")] + ["window"]
    counts = part.groupby("method")[names].nunique(dropna=False).max()
    return [name for name in names if counts[name] > 1]


def image_grid(
    runs: list[Run],
    groups: int = 6,
    tile: int = 96,
    leading: Mapping[str, Path] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Image.Image:
    """Set the same groups side by side: one row a group, one block of images a run.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        groups: rows, each of another category, spread evenly over the groups' names.
        tile: side of an image in pixels.
        leading: category -> a picture to stand before the runs' images, such as a protected asset; only groups of
            these categories are shown. None: all, without such a picture.
        titles: run id -> what to call it, where its method does not say that.

    Raises:
        ValueError: the runs share no group.
    """
    manifests = [group_rows(read_manifest(run.folder)) for run in runs]
    shared = [group for group in manifests[0] if all(group in manifest for manifest in manifests)]
    if leading is not None:
        shared = [group for group in shared if manifests[0][group][0].category in leading]
    if not shared:
        raise ValueError("The runs share no group: generate them with the same prompts")
    by_category = {manifests[0][group][0].category: group for group in reversed(shared)}
    firsts = sorted(by_category.values())
    chosen = [firsts[round(i * (len(firsts) - 1) / max(groups - 1, 1))] for i in range(min(groups, len(firsts)))]
    size = len(manifests[0][chosen[0]])
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    gap = 12
    heads = []
    for run in runs:
        request = run.identity["request"]
        method = request["method"]["name"]
        title = (titles or {}).get(run.id, TITLES.get(method, method))
        # 8 pixels hold a letter of this size.
        heads.append(_wrapped(f"{request['model']['name']}: {title}", size * tile // 8))
    header = 8 + 16 * max(head.count("\n") + 1 for head in heads)
    label_width = 190 + (tile + gap if leading is not None else 0)
    width = label_width + len(runs) * (size * tile + gap)
    sheet = Image.new("RGB", (width, header + len(chosen) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (run, manifest) in enumerate(zip(runs, manifests, strict=True)):
        left = label_width + column * (size * tile + gap)
        if column == 0 and leading is not None:
            draw.text((190, 4), "asset", "black", font)
        draw.multiline_text((left, 4), heads[column], "black", font)
        for line, group in enumerate(chosen):
            top = header + line * (tile + 4)
            if column == 0:
                draw.multiline_text((4, top + tile // 3), _wrapped(manifest[group][0].prompt), "black", font)
                if leading is not None:
                    sheet.paste(_tile(leading[manifest[group][0].category], tile), (190, top))
            for index, row in enumerate(manifest[group]):
                sheet.paste(_tile(run.folder / row.path, tile), (left + index * tile, top))
    return sheet


def _tile(file: Path, side: int) -> Image.Image:
    return load_picture(file).resize((side, side), Image.Resampling.LANCZOS)


def _wrapped(text: str, length: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _worth_showing(runs: list[Run], frame: pd.DataFrame, most: int = 6) -> list[Run]:
    """Return the runs of a model that an image grid has room for, of a sweep some that stand for the others.

    Where the baseline was swept along, as with guidance, those at both ends; else the baseline and settings spread
    evenly over the Pareto front, the chosen one among them.
    """
    if len(runs) <= most:
        return runs
    requests = [run.identity["request"] for run in runs]
    calls = [canonical(request["model"]["call"]) for request in requests]
    if len(set(calls)) > 1:
        return [run for run, call in zip(runs, calls, strict=True) if call in (calls[0], calls[-1])][:most]
    roles = frame[frame["run_id"] == runs[0].id].set_index("primary")["metric"]
    claim = next(metric for role, metric in roles.items() if role in ROLES and role != "quality")
    part = frame[frame["run_id"].isin([run.id for run in runs])]
    measured = (part, claim, roles["quality"], requests[0]["model"]["name"])
    front, best = pareto_front(*measured), chosen_run(*measured)
    spread = {front[round(place * (len(front) - 1) / (most - 3))] for place in range(most - 2)} | {best}
    return [
        run
        for run, request in zip(runs, requests, strict=True)
        if request["method"]["name"] == "none" or run.id in spread
    ]


def _titles(runs: list[Run], frame: pd.DataFrame) -> dict[str, str]:
    """Return what to call the runs in an image grid where their methods do not tell them apart."""
    methods = [run.identity["request"]["method"]["name"] for run in runs]
    if len(set(methods)) == len(methods):
        return {}
    labels = run_labels(frame)
    return {
        run.id: labels[run.id].removeprefix(method).strip() or TITLES.get(method, method)
        if methods.count(method) > 1 and method != "none"
        else labels[run.id].replace("none", TITLES["none"])
        for run, method in zip(runs, methods, strict=True)
    }


def plot(configs: list[DictConfig]) -> list[Path]:
    """Write the experiment's figures into the results folder and return their paths."""
    cfg = configs[0]
    results = project_path(cfg.results)
    frame = read_table(cfg.name, cfg.results)
    files = []
    for name, (figure, _) in figures(frame).items():
        files += save(figure, results / f"{cfg.name}_{name}")
    for model in dict.fromkeys(cfg.model.name for cfg in configs):
        # A grid of settings names its baseline more than once.
        chosen = [cfg for cfg in configs if cfg.model.name == model]
        runs = _worth_showing(list(dict.fromkeys(Run.find(cfg) for cfg in chosen)), frame)
        assets = read_assets(chosen[0].model.copyright.guidance) if cfg.primary.resemblance else None
        leading = None if assets is None else {asset.name: asset.file for asset in reversed(assets)}
        sheet = image_grid(runs, leading=leading, titles=_titles(runs, frame))
        files.append(save_sheet(sheet, results / f"{cfg.name}_grid_{model}.png"))
    return files


def main(argv: list[str]) -> None:
    for file in plot(expand(argv)):
        print(file)
