"""The table of experiments/latency.py becomes a page, LaTeX and figures: from the CSV alone, the same each time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.files import write_text
from experiments import project_path
from experiments.plot import COLOURS, FAINT, MARKERS, STYLE, _panels, save

#: The variant that all others are compared with.
PLAIN = "none"
#: The row of the floor: plain steps and, in the window, the bare matrix products and one pass over the tokens.
BOUND = "lower_bound"
#: The method as it is by default: what the targets and the paper's statements are of.
METHOD = "first"

#: The row of a profile that is of a step outside the window.
OUTSIDE = "outside the window"

#: A part of the cost outside the window that is told beside its target, and no answer to it.
CLOCKED = "of which hooks, by the clock"

#: Columns that say what was measured on what.
MEASURED = ["model", "weights", "side", "batch", "steps", "dtype", "compiled", "device", "threads"]
#: Columns that say on what: a figure has a row of panels for each.
SETUP = ["weights", "dtype", "compiled", "device", "threads"]

#: How the variants of conf/experiment/latency.yaml are called.
TITLES = {
    PLAIN: "without NegToMe",
    "first": "NegToMe, from the first image",
    "previous": "NegToMe, from the previous images",
    "others": "NegToMe, from all other images",
    "released": "NegToMe, released matching",
    "picture": "NegToMe, from a given picture",
    "outside": "NegToMe, outside the window",
    "naive": "naive transcription",
    "naive_released": "naive transcription, released matching",
    BOUND: "lower bound",
}
#: Variants in the order of their colours and shapes.
DRAWN = (PLAIN, "first", "naive", "others", "previous", "released", "picture", "outside")
WEIGHTS = {
    "random": (
        "random weights of the published architecture, as latency does not depend on their values (text encoders are "
        "not run, and a given picture is encoded by a tiny autoencoder)"
    ),
    "embedded": "the embedded model's weights",
    "checkpoint": "the checkpoint's weights",
}
LEGEND = (
    "Step: the denoiser, guidance and scheduler, median over all steps of all rounds [quartiles]. Ratios are to the "
    "same steps of the same round without NegToMe: median over rounds [95 % interval, exact for any distribution, "
    "where there are six rounds or more]. A round calls every variant twice, in turns, there and back. Outside: the "
    "steps after the window, which for the row of that name are all but the first. Whole call: prompt to latents at "
    "the model's own number of steps, with NegToMe in the window named. What a call does once is in the whole call "
    "and, as a median of three steps hides it, not in the step. From a given picture: its row in the batch is a "
    "further image to denoise, in the steps of the window. Released matching pushes cross-attention too, as the "
    "release does. Naive transcription: the passes over memory of the released code, written anew "
    "(experiments/naive.py). Lower bound: a step without, plus the bare matrix products of the paper's matching from "
    "the first image and one pass over the tokens that move."
)

PROFILE = (
    "Where it goes, of NegToMe from the first image: the method's own parts by the clock, in the median step; the push "
    "by operation, in the shares that torch's profiler gives, which makes small ones look too long. What they "
    "do to the rest of the step, such as to its caches, is in the ratio above and not here."
)


class Target(NamedTuple):
    """What the cost of the method is to be at most, as a ratio to the same without.

    Attributes:
        what: in words.
        model, side: of the rows it is of; four images in a call.
        quantity: "inside", "outside", "call" or "peak".
        limit: the ratio.
        variant: of the rows.
        window: (low, high), for whole calls.
    """

    what: str
    model: str
    side: int
    quantity: str
    limit: float
    variant: str = METHOD
    window: tuple[float, float] | None = None


TARGETS = (
    Target("step in the window", "flux-dev", 768, "inside", 1.04),
    Target("step in the window", "sdxl", 1024, "inside", 1.06),
    Target("step in the window", "mini-sdxl", 128, "inside", 1.05),
    Target("step in the window", "mini-flux", 128, "inside", 1.05),
    Target("whole call, 1000 to 900", "flux-dev", 768, "call", 1.01, window=(900, 1000)),
    Target("whole call, 1000 to 800", "sdxl", 1024, "call", 1.012, window=(800, 1000)),
    *(
        Target("attached, outside the window", model, side, "outside", 1.002, "outside")
        for model, side in (("flux-dev", 768), ("sdxl", 1024), ("mini-sdxl", 128), ("mini-flux", 128))
    ),
    Target("peak memory", "flux-dev", 1024, "peak", 1.01),
    Target("peak memory", "sdxl", 1024, "peak", 1.01),
)
#: Images in a call that targets are of.
TARGET_BATCH = 4
#: Models and sides (small, large) between which extra memory is to grow no faster than the number of tokens.
GROWTH = (("flux-dev", 1024, 2048), ("sdxl", 1024, 2048))


# Tables


def case_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table of one measured case: a row a variant, two columns a window of whole calls."""
    windows = list(rows[["t_low", "t_high"]].drop_duplicates().itertuples(index=False))
    table = []
    for variant, of_variant in rows.groupby("variant", sort=False):
        row = of_variant.iloc[0]
        entry = {"variant": TITLES.get(variant, variant)}
        missing = "out of memory" if row["call_how"] == "out of memory" else ""
        entry["step in the window, ms"] = missing or _spread(row, "inside", "ms")
        entry["ratio in the window"] = _ratio(row, "inside")
        entry["ratio outside"] = _ratio(row, "outside")
        for low, high in windows:
            here = of_variant[(of_variant["t_low"] == low) & (of_variant["t_high"] == high)].iloc[0]
            name = f"{high:g} to {low:g} ({here['steps_inside']:.0f} steps)"
            seconds = "" if pd.isna(here["call_s"]) else f"{_digits(here['call_s'])} ({_digits(here['image_s'])})"
            entry[f"{name}: call, s (an image)"] = seconds
            entry[f"{name}: ratio"] = _ratio(here, "call")
        entry["peak memory, MiB"] = "" if pd.isna(row["peak_mib"]) else f"{row['peak_mib']:.0f}"
        entry["peak ratio"] = _ratio(row, "peak")
        table.append(entry)
    frame = pd.DataFrame(table)
    return frame.loc[:, (frame != "").any()]


def profile_table(rows: pd.DataFrame, plain: pd.Series) -> pd.DataFrame:
    """Return what the method's part of a step is made of.

    Args:
        rows: those of one case's profile.
        plain: the row of the same case without.
    """
    cuda = rows["device_ms"].notna().any()
    of_step = "on the device, of a step without" if cuda else "of a step without"
    table = []
    for _, row in rows.iterrows():
        step_ms = plain["outside_ms" if row["operation"] == OUTSIDE else "inside_ms"]
        entry = {"what": row["operation"], "calls a step": f"{row['operation_calls']:.0f}"}
        entry["host, ms"] = _digits(row["host_ms"])
        entry |= {"device, ms": _digits(row["device_ms"])} if cuda else {}
        share = (row["device_ms"] if cuda else row["host_ms"]) / step_ms
        table.append(entry | {of_step: f"{share:.2%}".replace("%", " %")})
    return pd.DataFrame(table)


def scaling_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the curves over batch and resolution: what a step in the window costs beside one without, and memory."""
    curves = frame[frame["part"].isin(["batch", "resolution"])]
    several = curves.groupby("model")["device"].nunique().max() > 1 if len(curves) else False
    table = []
    for key, rows in curves.groupby([*SETUP, "model", "side", "batch"], sort=False, dropna=False):
        measured = dict(zip([*SETUP, "model", "side", "batch"], key, strict=True))
        points = rows.drop_duplicates("variant").set_index("variant")
        entry = {"model": measured["model"]} | ({"device": measured["device"]} if several else {})
        entry |= {"batch": f"{measured['batch']:.0f}", "side": f"{measured['side']:.0f}"}
        entry["step without, ms"] = _spread(points.loc[PLAIN], "inside", "ms")
        compared = [name for name in points.index if name != PLAIN]
        for name in compared:
            missing = "out of memory" if points.loc[name, "call_how"] == "out of memory" else ""
            entry[f"{TITLES.get(name, name)}: ratio"] = missing or _ratio(points.loc[name], "inside", spread=False)
        for name in compared:
            extra = points.loc[name, "peak_mib"] - points.loc[PLAIN, "peak_mib"]
            entry[f"{TITLES.get(name, name)}: extra MiB"] = "" if pd.isna(extra) else f"{extra:.0f}"
        table.append(entry)
    table = pd.DataFrame(table).fillna("")
    return table.loc[:, (table != "").any()]


def target_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what was aimed at beside what was measured, a row for every device that it was measured on."""
    table = []
    for target in TARGETS:
        entry = {"what": target.what, "of": f"{target.model} {target.side}", "at most": _percent(target.limit)}
        rows = _rows_of(frame, "table", target.model, target.side, target.variant, target.window)
        rows = rows[rows[f"{target.quantity}_ratio"].notna()].drop_duplicates(SETUP)
        for _, row in rows.iterrows():
            value, low, high = _values(row, target.quantity)
            shown = _percent(value) if low is None else f"{_percent(value)} [{_percent(low)}, {_percent(high)}]"
            table.append(
                entry | {"measured": shown, "verdict": _verdict(value, low, high, target.limit), "on": _setup(row)}
            )
            own = _own_share(frame, row) if target.quantity == "outside" else None
            if own is not None:
                clocked = {"what": CLOCKED, "measured": _percent(1 + own, digits=2)}
                table.append(entry | clocked | {"verdict": "", "on": _setup(row)})
        if rows.empty:
            table.append(entry | {"measured": "", "verdict": "not measured", "on": ""})
    for model, small, large in GROWTH:
        tokens = (large / small) ** 2
        entry = {"what": f"extra peak memory, {large} against {small}", "of": model, "at most": f"x {tokens:g}"}
        found = _growth(frame, model, small, large)
        for setup, before, after in found:
            grown = after / before if before > 0 else (math.inf if after > 0 else 0.0)
            shown = f"x {grown:.2f} ({before:.0f} to {after:.0f} MiB)"
            table.append(entry | {"measured": shown, "verdict": _verdict(grown, None, None, tokens), "on": setup})
        if not found:
            table.append(entry | {"measured": "", "verdict": "not measured", "on": ""})
    return pd.DataFrame(table)


def paper_table(frame: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's and the release's statements, and our measurement of the setting that has one.

    Args:
        frame: rows of latency.csv.
        paper: rows of results/paper.csv of this experiment.
    """
    table = []
    for (source, setting), rows in paper.groupby(["table", "model"], sort=False):
        notes = "; ".join(rows["note"].dropna().unique())
        seconds = rows[rows["metric"] == "seconds"].set_index("method")["value"]
        entry = {"source": source, "setting": setting, "device": "not available"}
        if len(seconds):
            without, with_it = seconds["none"], seconds["NegToMe"]
            entry |= {"without, s": f"{without:g}", "with, s": f"{with_it:g}", "increase": _percent(with_it / without)}
        else:
            (value,) = rows["value"]
            entry |= {"without, s": "not available", "with, s": "not available", "increase": f"{value:g} %"}
        table.append(entry | {"note": notes})
    unknown = dict.fromkeys(("device", "without, s", "with, s", "increase"), "not available")
    table.append({"source": "paper", "setting": "SDXL; memory of any model", **unknown, "note": ""})

    rows = _rows_of(frame, "table", "flux-dev", 768, PLAIN, (900, 1000))
    for _, plain in rows[rows["steps"] == 25].iterrows():
        same = _same_case(frame, plain)
        for variant in ("naive_released", "released", METHOD):
            found = frame[
                same & (frame["part"] == "table") & (frame["variant"] == variant) & (frame["t_low"] == plain["t_low"])
            ]
            for _, row in found[found["call_ratio"].notna()].iterrows():
                value, low, high = _values(row, "call")
                shown = _percent(value) if low is None else f"{_percent(value)} [{_percent(low)}, {_percent(high)}]"
                entry = {"source": f"here: {TITLES[variant]}", "setting": "FLUX.1-dev 768x768 25 steps 4 images"}
                entry |= {"device": _setup(row), "without, s": _digits(plain["call_s"])}
                entry |= {"with, s": _digits(row["call_s"]), "increase": shown}
                note = f"{row['weights']} weights"
                if row["weights"] == "random":
                    note += "; without text encoders and decoding"
                elif row["call_how"] == "composed":
                    note += "; without decoding"
                table.append(entry | {"note": note})
    if rows.empty:
        ours = {"source": "here", "setting": "FLUX.1-dev 768x768 25 steps 4 images"}
        table.append(ours | dict.fromkeys(unknown, "not measured") | {"note": ""})
    return pd.DataFrame(table)


def _rows_of(
    frame: pd.DataFrame, part: str, model: str, side: int, variant: str, window: tuple[float, float] | None = None
) -> pd.DataFrame:
    chosen = (frame["part"] == part) & (frame["model"] == model) & (frame["side"] == side)
    chosen &= (frame["variant"] == variant) & (frame["batch"] == TARGET_BATCH)
    if window is not None:
        chosen &= (frame["t_low"] == window[0]) & (frame["t_high"] == window[1])
    return frame[chosen]


def _growth(frame: pd.DataFrame, model: str, small: int, large: int) -> list[tuple[str, float, float]]:
    """Return (setup, extra MiB at the small side, at the large one) for every device that memory was measured on."""
    curve = frame[(frame["part"] == "resolution") & (frame["model"] == model) & (frame["batch"] == TARGET_BATCH)]
    found = []
    for _, rows in curve.groupby(SETUP, sort=False, dropna=False):
        peaks = rows.pivot_table(index="side", columns="variant", values="peak_mib")
        if {PLAIN, METHOD} <= set(peaks.columns) and {small, large} <= set(peaks.index):
            extra = peaks[METHOD] - peaks[PLAIN]
            if extra[[small, large]].notna().all():
                found.append((_setup(rows.iloc[0]), float(extra[small]), float(extra[large])))
    return found


def _verdict(value: float, low: float | None, high: float | None, limit: float) -> str:
    """Say whether a value is within its limit; an interval that holds the limit leaves it open."""
    if low is None:
        return "met" if value <= limit else "not met"
    return "met" if high <= limit else "not met" if low > limit else "undecided"


def _values(row: pd.Series, quantity: str) -> tuple[float, float | None, float | None]:
    """Return a ratio and its interval, None where it has none."""
    low, high = (row.get(f"{quantity}_ratio_{end}") for end in ("low", "high"))
    return row[f"{quantity}_ratio"], *((None, None) if pd.isna(low) else (low, high))


def _ratio(row: pd.Series, quantity: str, spread: bool = True) -> str:
    value, low, high = _values(row, quantity)
    if pd.isna(value):
        return ""
    return f"{value:.3f}" if low is None or not spread else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _spread(row: pd.Series, quantity: str, unit: str) -> str:
    middle, low, high = (row[f"{quantity}_{part}{unit}"] for part in ("", "q1_", "q3_"))
    return "" if pd.isna(middle) else f"{_digits(middle)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    """Write a positive number with three digits or, above 1000, as a whole one; others are noise around 0."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _percent(ratio: float, digits: int = 1) -> str:
    return f"{ratio - 1:+.{digits}%}".replace("%", " %")


def _setup(row: pd.Series) -> str:
    threads = "" if pd.isna(row["threads"]) else f", {row['threads']:.0f} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['device']}{threads}{', compiled' if row['compiled'] else ''}"


# Pages


def measured_cases(frame: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """Yield the cases of the table: the first row of each, and all."""
    for _, rows in frame[frame["part"] == "table"].groupby(MEASURED, sort=False, dropna=False):
        yield rows.iloc[0], rows


def render_markdown(frame: pd.DataFrame, description: str | None, paper: pd.DataFrame) -> str:
    """Return the page: targets, the table of every case, the curves, and the paper's statements.

    Args:
        frame: rows of latency.csv.
        description: what is measured, a sentence.
        paper: rows of results/paper.csv of this experiment.
    """
    name = frame["experiment"].iloc[0]
    parts = [f"# {name}", ""]
    if description:
        parts += [description, ""]
    parts += [LEGEND, "", "## Targets", "", _markdown(target_table(frame)), ""]
    parts += [
        "Of NegToMe from the first image, four images in a call. Undecided: the interval holds the limit; where there "
        "is no interval, the median decides. Hooks by the clock: what the calling thread does for it in such a step, "
        "measured in place, which leaves out what that does to the rest of the step.",
        "",
    ]
    for first, rows in measured_cases(frame):
        parts += [f"## {_title(first)}", "", _how(first), "", _markdown(case_table(rows)), ""]
        profile = _profile_of(frame, first)
        if len(profile):
            plain = rows[rows["variant"] == PLAIN].iloc[0]
            parts += [PROFILE, "", _markdown(profile_table(profile, plain)), ""]
    scaling = scaling_table(frame)
    if len(scaling):
        parts += [
            "## Scaling",
            "",
            "Steps in the window, in ratio to the same without; intervals are in the figure.",
            "",
        ]
        parts += [_markdown(scaling), ""]
    for model in curve_models(frame):
        parts += [f"![Cost over batch, resolution and window, {model}]({name}_{model}.png)", ""]
    parts += ["## The paper's statements", "", _markdown(paper_table(frame, paper)), ""]
    return "\n".join(parts)


def render_latex(frame: pd.DataFrame) -> str:
    """Return the tables of `render_markdown` that are ours as LaTeX."""
    tables = [target_table(frame), *(case_table(rows) for _, rows in measured_cases(frame)), scaling_table(frame)]
    return "\n".join(table.to_latex(index=False, escape=True) for table in tables if len(table))


def _profile_of(frame: pd.DataFrame, case: pd.Series) -> pd.DataFrame:
    return frame[_same_case(frame, case) & (frame["part"] == "profile")]


def _own_share(frame: pd.DataFrame, case: pd.Series) -> float | None:
    """Return what the host does for the method in a step outside the window, as a share of that step without."""
    same = frame[_same_case(frame, case)]
    hooks = same.loc[(same["part"] == "profile") & (same["operation"] == OUTSIDE), "host_ms"]
    plain = same.loc[(same["part"] == "table") & (same["variant"] == PLAIN), "outside_ms"]
    return hooks.iloc[0] / plain.iloc[0] if len(hooks) and len(plain) else None


def _same_case(frame: pd.DataFrame, case: pd.Series) -> pd.Series:
    values, wanted = frame[MEASURED], case[MEASURED]
    return ((values == wanted) | (values.isna() & wanted.isna())).all(axis=1)


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def _title(row: pd.Series) -> str:
    return f"{row['model']}, {row['side']:.0f} x {row['side']:.0f}, {row['batch']:.0f} images, {row['steps']:.0f} steps"


def _how(row: pd.Series) -> str:
    """Say on what and how a case was measured."""
    software = [f"torch {row['torch']}", f"diffusers {row['diffusers']}"]
    software += [] if pd.isna(row["cuda"]) else [f"CUDA {row['cuda']}"]
    composed = f"from calls of {row['measured_steps']:.0f} steps, {row['measured_inside']:.0f} of them in the window"
    whole = "Whole calls were measured." if row["call_how"] == "measured" else f"Whole calls are composed {composed}."
    return (
        f"{_setup(row)}; {row['dtype']}; {', '.join(software)}; {WEIGHTS[row['weights']]}. "
        f"{row['rounds']:.0f} rounds. {whole}"
    )


# Figures


def curve_models(frame: pd.DataFrame) -> list[str]:
    """Return the models that have a curve of two points or more."""
    curves = frame[frame["part"].isin(["batch", "resolution", "window"])]
    return [
        model
        for model, rows in curves.groupby("model", sort=False)
        if (rows.groupby("part")[["side", "batch", "t_low"]].nunique() > 1).any(axis=None)
    ]


def scaling(frame: pd.DataFrame, model: str) -> Figure:
    """Draw what the method adds, over the batch, the resolution and the length of the window.

    A row of panels for every device; bars are 95 % intervals, none where there are too few rounds.

    Args:
        frame: rows of latency.csv.
        model: one of `curve_models`.

    Raises:
        ValueError: the table has no curve of this model.
    """
    if model not in curve_models(frame):
        raise ValueError(f"expected a model with curves ({', '.join(curve_models(frame))}), got {model!r}")
    frame = frame[(frame["model"] == model) & frame["part"].isin(["batch", "resolution", "window"])]
    panels = _curves(frame)
    setups = list(frame.groupby(SETUP, sort=False, dropna=False))
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), 2.9 * len(panels), 0.9 + 2.4 * len(setups), rows=len(setups))
        for line, (_, rows) in zip(axes, setups, strict=True):
            for axis, (kind, side, batch) in zip(line, panels, strict=True):
                here = rows[(rows["part"] == ("resolution" if kind == "memory" else kind))]
                here = here[(here["side"] == side) | (kind in ("resolution", "memory"))]
                here = here[(here["batch"] == batch) | (kind == "batch")]
                axis.set_visible(not here.empty)
                _draw(axis, kind, here)
                size = "" if kind in ("resolution", "memory") else f"{side:.0f} x {side:.0f}"
                images = "" if kind == "batch" else f"{batch:.0f} images"
                axis.set_title(", ".join(text for text in (size, images) if text))
            if len(setups) > 1:
                line[0].set_ylabel(f"{_setup(rows.iloc[0])}\n{line[0].get_ylabel()}")
        handles = dict(
            pair for axis in axes.flat for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
        )
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        where = f" on {_setup(frame.iloc[0])}" if len(setups) == 1 else ""
        figure.suptitle(f"{model}{where}: what is added to the same calls without NegToMe; bars: 95 % intervals")
    return figure


def _curves(frame: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Return the panels of a model: what they are over, and the side and batch that stay the same."""
    panels = []
    for part, over in (("batch", "side"), ("resolution", "batch"), ("window", ["side", "batch"])):
        rows = frame[frame["part"] == part].drop_duplicates(over)
        panels += [(part, row["side"], row["batch"]) for _, row in rows.iterrows()]
        if part == "resolution" and rows["peak_mib"].notna().any():
            panels += [("memory", row["side"], row["batch"]) for _, row in rows.iterrows()]
    return panels


def _draw(axis: Axes, kind: str, rows: pd.DataFrame) -> None:
    x, label = {
        "batch": ("batch", "images in a call"),
        "resolution": ("side", "side, pixels"),
        "memory": ("side", "side, pixels"),
        "window": ("steps_inside", f"steps in the window, of {rows['steps'].max():.0f}" if len(rows) else ""),
    }[kind]
    plain = rows[rows["variant"] == PLAIN].set_index(x)["peak_mib"]
    for name in (name for name in rows["variant"].unique() if name != PLAIN):
        points = rows[rows["variant"] == name].sort_values(x)
        if kind == "memory":
            values, errors = points["peak_mib"] - points[x].map(plain), None
        else:
            ratio = "call_ratio" if kind == "window" else "inside_ratio"
            values = 100 * (points[ratio] - 1)
            ends = [points[f"{ratio}_{end}"].fillna(points[ratio]) for end in ("low", "high")]
            errors = [(100 * (points[ratio] - ends[0])).clip(0), (100 * (ends[1] - points[ratio])).clip(0)]
        if values.notna().any():
            axis.errorbar(points[x], values, yerr=errors, label=TITLES.get(name, name), **_look(name))
    if kind == "batch" and len(rows):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(rows[x].unique()), [f"{value:.0f}" for value in sorted(rows[x].unique())])
        axis.minorticks_off()
    axis.set_xlabel(label)
    axis.set_ylabel(
        {"memory": "extra peak memory, MiB", "window": "added to a whole call, %"}.get(kind, "added to a step, %")
    )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid()


def _look(variant: str) -> dict[str, Any]:
    if variant == BOUND:
        return {"color": FAINT, "linestyle": "--"}
    place = DRAWN.index(variant) if variant in DRAWN else -1
    return {"color": COLOURS[place], "marker": MARKERS[place]}


# All of it


def write(frame: pd.DataFrame, folder: Path, name: str, description: str | None) -> str:
    """Write `<folder>/<name>.md`, `.tex` and the figures of the curves; return the Markdown.

    Args:
        frame: rows of latency.csv.
        folder: where the results lie.
        name: the experiment's.
        description: what is measured, a sentence.
    """
    paper = pd.read_csv(project_path("results/paper.csv"))
    markdown = render_markdown(frame, description, paper[paper["experiment"] == name])
    write_text(folder / f"{name}.md", markdown)
    write_text(folder / f"{name}.tex", render_latex(frame))
    for model in curve_models(frame):
        save(scaling(frame, model), folder / f"{name}_{model}")
    return markdown


def files(folder: Path, name: str) -> list[Path]:
    """Return what there is of an experiment's table, pages and figures."""
    found = [folder / f"{name}.{kind}" for kind in ("csv", "md", "tex")]
    found += sorted(path for kind in ("png", "pdf") for path in folder.glob(f"{name}_*.{kind}"))
    return [path for path in found if path.exists()]
