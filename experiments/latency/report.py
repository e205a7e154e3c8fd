"""The table of what the method costs becomes a page, LaTeX and figures: from the CSV alone, the same each time."""

import math
from collections.abc import Callable, Mapping
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
    """Return each case's row without NegToMe and its table: a row a variant, two columns a window of whole calls."""
    tables = []
    for _, rows in where(frame, part="table").groupby(MEASURED, sort=False, dropna=False):
        table = []
        for variant, windows in rows.groupby("variant", sort=False):
            row = windows.iloc[0]
            cells = {"variant": titles.get(variant, variant), "step in the window, ms": _missing(row) or _step(row)}
            cells |= {"ratio in the window": _ratio(row, "inside"), "ratio outside": _ratio(row, "outside")}
            for _, here in windows.iterrows():
                window = f"{here['t_high']:g} to {here['t_low']:g} ({here['steps_inside']:.0f} steps)"
                call = "" if pd.isna(here["call_s"]) else f"{_short(here['call_s'])} ({_short(here['image_s'])})"
                cells |= {f"{window}: call, s (an image)": call, f"{window}: ratio": _ratio(here, "call")}
            table.append(cells | {"peak memory, MiB": _whole(row["peak_mib"]), "peak ratio": _ratio(row, "peak")})
        tables.append((where(rows, variant=PLAIN).iloc[0], printed(table)))
    return tables


def profile_table(rows: pd.DataFrame, plain: Mapping[str, float]) -> pd.DataFrame:
    """Return what the method's part of a step is made of, from a case's profile and its row without NegToMe."""
    time, whose = ("device_ms", "on the device, ") if rows["device_ms"].notna().any() else ("host_ms", "")
    return printed(
        {
            "what": row["operation"],
            "calls a step": _whole(row["operation_calls"]),
            "host, ms": _short(row["host_ms"]),
            "device, ms": _short(row["device_ms"]),
            f"{whose}of a step without":
                f"{100 * row[time] / plain['outside_ms' if row['operation'] == OUTSIDE else 'inside_ms']:.2f} %",
        }
        for _, row in rows.iterrows()
    )  # fmt: skip


def scaling_table(frame: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return the curves over batch and resolution: what a step in the window costs beside one without, and memory."""
    curves = frame[frame["part"].isin(["batch", "resolution"])]
    several = curves.groupby("model")["device"].nunique().gt(1).any()
    table = []
    for _, rows in curves.groupby([*SETUP, "model", "side", "batch"], sort=False, dropna=False):
        points = rows.drop_duplicates("variant").set_index("variant")
        plain, compared = points.loc[PLAIN], points.drop(PLAIN).rename(dict(titles))
        cells = {"model": plain["model"], "device": plain["device"] if several else ""}
        cells |= {"batch": _whole(plain["batch"]), "side": _whole(plain["side"]), "step without, ms": _step(plain)}
        for title, row in compared.iterrows():
            cells[f"{title}: ratio"] = _missing(row) or with_interval("{:.3f}".format, row["inside_ratio"])
        for title, row in compared.iterrows():
            cells[f"{title}: extra MiB"] = _whole(row["peak_mib"] - plain["peak_mib"])
        table.append(cells)
    return printed(table)


def target_table(frame: pd.DataFrame, cfg: DictConfig) -> pd.DataFrame:
    """Return what was aimed at beside what was measured, a row for every device that it was measured on."""
    table = []
    for target in cfg.latency.targets:
        told = {"what": target.what, "of": f"{target.model} {target.side}", "at most": _percent(target.limit)}
        values = {"model": target.model, "side": target.side, "variant": target.get("variant", METHOD)}
        values |= dict(zip(("t_low", "t_high"), target.get("window", ()), strict=False))
        rows = where(frame, part="table", batch=cfg.latency.target_batch, **values)
        found = []
        for _, row in rows.dropna(subset=f"{target.quantity}_ratio").drop_duplicates(SETUP).iterrows():
            verdict, on = _verdict(*_ends(row, target.quantity), target.limit), setup_of(row)
            found.append({"measured": _ratio(row, target.quantity, _percent), "verdict": verdict, "on": on})
            same = where(frame, **row[MEASURED])
            hooks = where(same, part="profile", operation=OUTSIDE)["host_ms"].to_numpy()
            plain = where(same, part="table", variant=PLAIN)["outside_ms"].to_numpy()
            if target.quantity == "outside" and len(hooks) and len(plain):  # told beside it, and no answer to it
                share = f"{100 * hooks[0] / plain[0]:+.2f} %"
                found.append({"what": "of which hooks, by the clock", "measured": share, "verdict": "", "on": on})
        table += [told | one for one in found or [UNMEASURED]]
    for model, sides in cfg.latency.growth.items():
        limit, found = (sides[1] / sides[0]) ** 2, []
        rows = where(frame, part="resolution", batch=cfg.latency.target_batch, model=model)
        for _, here in rows.groupby([*SETUP, "steps"], sort=False, dropna=False):
            peaks = here.set_index(["variant", "side"])["peak_mib"]
            before, after = (peaks.get((METHOD, side), nan) - peaks.get((PLAIN, side), nan) for side in sides)
            if not pd.isna(before + after):
                grown = after / before if before > 0 else math.inf if after > 0 else 0.0
                one = {"measured": f"x {grown:.2f} ({before:.0f} to {after:.0f} MiB)"}
                found.append(one | {"verdict": _verdict(grown, nan, nan, limit), "on": setup_of(here.iloc[0])})
        told = {"what": "extra peak memory, {1} against {0}".format(*sides), "of": model, "at most": f"x {limit:g}"}
        table += [told | one for one in found or [UNMEASURED]]
    return pd.DataFrame(table)


def where(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows that hold these values, by column; that there is none is a value too."""
    for column, value in values.items():
        frame = frame[frame[column].isna() if pd.isna(value) else frame[column] == value]
    return frame


def _verdict(value: float, low: float, high: float, limit: float) -> str:
    """Say whether a value is within its limit; an interval that holds the limit leaves it open."""
    low, high = (value, value) if pd.isna(low) else (low, high)
    return "met" if high <= limit else "not met" if low > limit else "undecided"


def _ratio(row: pd.Series, quantity: str, write: Callable[[float], str] = "{:.3f}".format) -> str:
    return with_interval(write, *_ends(row, quantity))


def _ends(row: pd.Series, quantity: str) -> list[float]:
    """Return a ratio and the ends of its interval; that of memory has none."""
    return [row.get(f"{quantity}_ratio{end}", nan) for end in ("", "_low", "_high")]


def _step(row: pd.Series) -> str:
    return with_interval(_short, row["inside_ms"], row["inside_q1_ms"], row["inside_q3_ms"])


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _whole(value: float) -> str:
    return with_interval("{:.0f}".format, value)


def _short(value: float) -> str:
    """Write a positive number with three digits or, above 1000, as a whole one; others are noise around 0."""
    if pd.isna(value):
        return ""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _missing(row: pd.Series) -> str:
    return OUT_OF_MEMORY if row["call_how"] == OUT_OF_MEMORY else ""


def pages(frame: pd.DataFrame, cfg: DictConfig) -> tuple[str, str]:
    """Return the page, of targets, cases, curves and the paper's statements; and as LaTeX, those tables that are ours.

    Args:
        frame: rows of latency.csv.
        cfg: the composed configuration: `name`, `description`, and of `latency` the titles and what was aimed at.
    """
    titles, cases = cfg.latency.titles, []
    for plain, table in case_tables(frame, titles):
        profile = where(frame, part="profile", **plain[MEASURED])
        cases.append((plain.to_dict(), setup_of(plain), table, profile_table(profile, plain) if len(profile) else None))
    targets, curves = target_table(frame, cfg), scaling_table(frame, titles)
    drawn, paper = curve_models(frame), paper_table(cfg.name).astype(object).fillna("")
    facts = {"targets": targets, "cases": cases, "scaling": curves, "drawn": drawn, "paper": paper}
    page = render("latency/page.md.j2", cfg=cfg, markdown=markdown, **facts)
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
