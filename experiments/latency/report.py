"""The page, LaTeX and figures of latency.csv, made from the CSV alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from experiments.figures.style import save
from experiments.latency.cases import METHOD, PLAIN
from experiments.latency.profile import OUTSIDE
from experiments.latency.rows import MEASURED, OUT_OF_MEMORY
from experiments.latency.scaling import SETUP, curve_models, scaling, setup_of
from experiments.tables.columns import latex, markdown, printed
from experiments.tables.pages import paper_table, with_interval
from experiments.tables.templates import render

UNMEASURED = {"measured": "", "verdict": "not measured", "on": ""}


def case_tables(frame: pd.DataFrame, titles: Mapping[str, str]) -> list[tuple[pd.Series, pd.DataFrame]]:
    """Return each case's baseline row and its table: a row a variant, two columns a timestep range of whole calls."""
    tables = []
    for _, rows in select_rows(frame, part="table").groupby(MEASURED, sort=False, dropna=False):
        table = []
        for variant, windows in rows.groupby("variant", sort=False):
            row = windows.iloc[0]
            cells = {"variant": titles.get(variant, variant), "step in the window, ms": _missing(row) or _step(row)}
            cells |= {"ratio in the window": _ratio(row, "inside"), "ratio outside": _ratio(row, "outside")}
            for _, call in windows.iterrows():
                window = f"{call['t_high']:g} to {call['t_low']:g} ({call['steps_inside']:.0f} steps)"
                seconds = "" if pd.isna(call["call_s"]) else f"{_short(call['call_s'])} ({_short(call['image_s'])})"
                cells |= {f"{window}: call, s (an image)": seconds, f"{window}: ratio": _ratio(call, "call")}
            table.append(cells | {"peak memory, MiB": _whole(row["peak_mib"]), "peak ratio": _ratio(row, "peak")})
        tables.append((select_rows(rows, variant=PLAIN).iloc[0], printed(table)))
    return tables


def profile_table(rows: pd.DataFrame, baseline: Mapping[str, float]) -> pd.DataFrame:
    """Return the parts and operations of the method in a step, from a case's profile and its baseline row."""
    time, whose = ("device_ms", "on the device, ") if rows["device_ms"].notna().any() else ("host_ms", "")
    return printed(
        {
            "what": row["operation"],
            "calls a step": _whole(row["operation_calls"]),
            "host, ms": _short(row["host_ms"]),
            "device, ms": _short(row["device_ms"]),
            f"{whose}of a step without":
                f"{100 * row[time] / baseline['outside_ms' if row['operation'] == OUTSIDE else 'inside_ms']:.2f} %",
        }
        for _, row in rows.iterrows()
    )  # fmt: skip


def scaling_table(frame: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return the curves over batch and resolution: steps in the timestep range and memory, by variant."""
    curves = frame[frame["part"].isin(["batch", "resolution"])]
    several = curves.groupby("model")["device"].nunique().gt(1).any()
    table = []
    for _, rows in curves.groupby([*SETUP, "model", "side", "batch"], sort=False, dropna=False):
        points = rows.drop_duplicates("variant").set_index("variant")
        baseline, compared = points.loc[PLAIN], points.drop(PLAIN).rename(dict(titles))
        cells = {"model": baseline["model"], "device": baseline["device"] if several else ""}
        cells |= {
            "batch": _whole(baseline["batch"]),
            "side": _whole(baseline["side"]),
            "step without, ms": _step(baseline),
        }
        for title, row in compared.iterrows():
            cells[f"{title}: ratio"] = _missing(row) or with_interval("{:.3f}".format, row["inside_ratio"])
        for title, row in compared.iterrows():
            cells[f"{title}: extra MiB"] = _whole(row["peak_mib"] - baseline["peak_mib"])
        table.append(cells)
    return printed(table)


def target_table(frame: pd.DataFrame, cfg: DictConfig) -> pd.DataFrame:
    """Return the targets and the measured values, a row for every device."""
    table = []
    for target in cfg.latency.targets:
        facts = {"what": target.what, "of": f"{target.model} {target.side}", "at most": _percent(target.limit)}
        table += [facts | row for row in _measured_target(frame, cfg, target) or [UNMEASURED]]
    for model, sides in cfg.latency.growth.items():
        limit = (sides[1] / sides[0]) ** 2
        what = "extra peak memory, {1} against {0}".format(*sides)
        facts = {"what": what, "of": model, "at most": f"x {limit:g}"}
        table += [facts | row for row in _measured_growth(frame, cfg, model, sides, limit) or [UNMEASURED]]
    return pd.DataFrame(table)


def _measured_target(frame: pd.DataFrame, cfg: DictConfig, target: DictConfig) -> list[dict[str, str]]:
    values = {"model": target.model, "side": target.side, "variant": target.get("variant", METHOD)}
    values |= dict(zip(("t_low", "t_high"), target.get("window", ()), strict=False))
    rows = select_rows(frame, part="table", batch=cfg.latency.target_batch, **values)
    table = []
    for _, row in rows.dropna(subset=f"{target.quantity}_ratio").drop_duplicates(SETUP).iterrows():
        verdict, device = _verdict(*_ends(row, target.quantity), target.limit), setup_of(row)
        table.append({"measured": _ratio(row, target.quantity, _percent), "verdict": verdict, "on": device})
        same_case = select_rows(frame, **row[MEASURED])
        hooks = select_rows(same_case, part="profile", operation=OUTSIDE)["host_ms"].to_numpy()
        baseline = select_rows(same_case, part="table", variant=PLAIN)["outside_ms"].to_numpy()
        if target.quantity == "outside" and len(hooks) and len(baseline):  # a second measurement, without a verdict
            share = f"{100 * hooks[0] / baseline[0]:+.2f} %"
            table.append({"what": "of which hooks, by the clock", "measured": share, "verdict": "", "on": device})
    return table


def _measured_growth(
    frame: pd.DataFrame, cfg: DictConfig, model: str, sides: Sequence[int], limit: float
) -> list[dict[str, str]]:
    rows = select_rows(frame, part="resolution", batch=cfg.latency.target_batch, model=model)
    table = []
    for _, setup in rows.groupby([*SETUP, "steps"], sort=False, dropna=False):
        peaks = setup.set_index(["variant", "side"])["peak_mib"]
        before, after = (peaks.get((METHOD, side), nan) - peaks.get((PLAIN, side), nan) for side in sides)
        if pd.isna(before + after):
            continue
        growth = after / before if before > 0 else 0.0
        if after > 0 >= before:
            growth = math.inf
        cells = {"measured": f"x {growth:.2f} ({before:.0f} to {after:.0f} MiB)"}
        table.append(cells | {"verdict": _verdict(growth, nan, nan, limit), "on": setup_of(setup.iloc[0])})
    return table


def select_rows(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows with these values, by column; a missing value selects missing values."""
    for column, value in values.items():
        frame = frame[frame[column].isna() if pd.isna(value) else frame[column] == value]
    return frame


def _verdict(value: float, low: float, high: float, limit: float) -> str:
    """Return whether a value is within its limit; undecided where the interval contains the limit."""
    low, high = (value, value) if pd.isna(low) else (low, high)
    if high <= limit:
        return "met"
    return "not met" if low > limit else "undecided"


def _ratio(row: pd.Series, quantity: str, write: Callable[[float], str] = "{:.3f}".format) -> str:
    return with_interval(write, *_ends(row, quantity))


def _ends(row: pd.Series, quantity: str) -> list[float]:
    """Return a ratio and the limits of its interval, which memory does not have."""
    return [row.get(f"{quantity}_ratio{end}", nan) for end in ("", "_low", "_high")]


def _step(row: pd.Series) -> str:
    return with_interval(_short, row["inside_ms"], row["inside_q1_ms"], row["inside_q3_ms"])


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _whole(value: float) -> str:
    return with_interval("{:.0f}".format, value)


def _short(value: float) -> str:
    """Write a positive number with three digits or, above 1000, without decimals; others are noise around 0."""
    if pd.isna(value):
        return ""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _missing(row: pd.Series) -> str:
    return OUT_OF_MEMORY if row["call_how"] == OUT_OF_MEMORY else ""


def pages(frame: pd.DataFrame, cfg: DictConfig) -> tuple[str, str]:
    """Return the page of targets, cases, curves and the paper's statements, and our tables as LaTeX.

    Args:
        frame: rows of latency.csv.
        cfg: the composed configuration; `name`, `description`, and the titles and targets of `latency` are read.
    """
    titles, cases = cfg.latency.titles, []
    for baseline, table in case_tables(frame, titles):
        profile = select_rows(frame, part="profile", **baseline[MEASURED])
        cases.append(
            (baseline.to_dict(), setup_of(baseline), table, profile_table(profile, baseline) if len(profile) else None)
        )
    targets, curves = target_table(frame, cfg), scaling_table(frame, titles)
    drawn, paper = curve_models(frame), paper_table(cfg.name).astype(object).fillna("")
    facts = {"targets": targets, "cases": cases, "scaling": curves, "drawn": drawn, "paper": paper}
    page = render("experiments/latency/page.md.j2", cfg=cfg, markdown=markdown, **facts)
    return page, latex([targets, *(table for _, _, table, _ in cases), curves])


def write(frame: pd.DataFrame, cfg: DictConfig, folder: Path) -> str:
    """Write `table.md` and the figures of the curves, with style=paper also LaTeX; return the Markdown of `pages`."""
    page, tex = pages(frame, cfg)
    write_text(folder / "table.md", page)
    if cfg.style == "paper":
        write_text(folder / "paper" / "table.tex", tex)
    for model in curve_models(frame):
        save(scaling(frame, model, cfg.latency.titles), folder / model)
    return page
