"""The table of what the method costs becomes a page, LaTeX and figures: from the CSV alone, the same each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from experiments.figures.scaling import SETUP, curve_models, scaling, setup_of
from experiments.figures.style import save
from experiments.pages import paper_table, with_interval
from experiments.tables import latex, markdown
from experiments.templates import render
from experiments.timing.cases import METHOD, PLAIN
from experiments.timing.profile import OUTSIDE
from experiments.timing.rows import MEASURED, OUT_OF_MEMORY


def case_tables(frame: pd.DataFrame, titles: Mapping[str, str]) -> list[tuple[pd.Series, pd.DataFrame]]:
    """Return each case's row without NegToMe and its table: a row a variant, two columns a window of whole calls."""
    cases = where(frame, part="table").groupby(MEASURED, sort=False, dropna=False)
    return [(where(rows, variant=PLAIN).iloc[0], _case_table(rows, titles)) for _, rows in cases]


def _case_table(rows: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    table = []
    for variant, of_variant in rows.groupby("variant", sort=False):
        row = of_variant.iloc[0]
        entry = {"variant": titles.get(variant, variant), "step in the window, ms": _missing(row) or _step(row)}
        entry |= {"ratio in the window": _ratio(row, "inside"), "ratio outside": _ratio(row, "outside")}
        for _, here in of_variant.iterrows():
            window = f"{here['t_high']:g} to {here['t_low']:g} ({here['steps_inside']:.0f} steps)"
            call = "" if pd.isna(here["call_s"]) else f"{_short(here['call_s'])} ({_short(here['image_s'])})"
            entry |= {f"{window}: call, s (an image)": call, f"{window}: ratio": _ratio(here, "call")}
        table.append(entry | {"peak memory, MiB": _whole(row["peak_mib"]), "peak ratio": _ratio(row, "peak")})
    return _without_empty_columns(table)


def profile_table(rows: pd.DataFrame, plain: pd.Series) -> pd.DataFrame:
    """Return what the method's part of a step is made of, from a case's profile and its row without NegToMe."""
    times = ["host_ms", "device_ms"] if rows["device_ms"].notna().any() else ["host_ms"]
    table = {"what": rows["operation"], "calls a step": rows["operation_calls"].map(_whole)}
    table |= {f"{time.removesuffix('_ms')}, ms": rows[time].map(_short) for time in times}
    steps = [plain["outside_ms" if operation == OUTSIDE else "inside_ms"] for operation in rows["operation"]]
    where = "on the device, " if len(times) > 1 else ""
    return pd.DataFrame(table | {f"{where}of a step without": (100 * rows[times[-1]] / steps).map("{:.2f} %".format)})


def scaling_table(frame: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return the curves over batch and resolution: what a step in the window costs beside one without, and memory."""
    curves = frame[frame["part"].isin(["batch", "resolution"])]
    several = curves.groupby("model")["device"].nunique().gt(1).any()
    table = []
    for _, rows in curves.groupby([*SETUP, "model", "side", "batch"], sort=False, dropna=False):
        points = rows.drop_duplicates("variant").set_index("variant")
        plain, compared = points.loc[PLAIN], points.drop(PLAIN).rename(dict(titles))
        entry = {"model": plain["model"]} | ({"device": plain["device"]} if several else {})
        entry |= {"batch": _whole(plain["batch"]), "side": _whole(plain["side"]), "step without, ms": _step(plain)}
        for title, row in compared.iterrows():
            entry[f"{title}: ratio"] = _missing(row) or with_interval("{:.3f}".format, row["inside_ratio"])
        for title, row in compared.iterrows():
            entry[f"{title}: extra MiB"] = _whole(row["peak_mib"] - plain["peak_mib"])
        table.append(entry)
    return _without_empty_columns(table)


def target_table(frame: pd.DataFrame, cfg: DictConfig) -> pd.DataFrame:
    """Return what was aimed at beside what was measured, a row for every device that it was measured on."""
    table, unmeasured = [], {"measured": "", "verdict": "not measured", "on": ""}
    for target, found in (*_targets(frame, cfg), *_growth(frame, cfg)):
        table += [target | one for one in found or [unmeasured]]
    return pd.DataFrame(table)


def _targets(frame: pd.DataFrame, cfg: DictConfig) -> Iterator[tuple[dict[str, str], list[dict[str, str]]]]:
    """Yield what was aimed at of times and peaks, each with what was measured of it, by device."""
    measured = where(frame, part="table", batch=cfg.latency.target_batch)
    for target in cfg.latency.targets:
        told = {"what": target.what, "of": f"{target.model} {target.side}", "at most": _percent(target.limit)}
        values = {"model": target.model, "side": target.side, "variant": target.get("variant", METHOD)}
        values |= dict(zip(("t_low", "t_high"), target.get("window", ()), strict=False))
        rows, found = where(measured, **values).dropna(subset=f"{target.quantity}_ratio"), []
        for _, row in rows.drop_duplicates(SETUP).iterrows():
            verdict, on = _verdict(*_ends(row, target.quantity), target.limit), setup_of(row)
            found.append({"measured": _ratio(row, target.quantity, _percent), "verdict": verdict, "on": on})
            own = _own_share(frame, row) if target.quantity == "outside" else None
            if own is not None:  # told beside the target, and no answer to it
                hooks = {"what": "of which hooks, by the clock", "measured": f"{100 * own:+.2f} %"}
                found.append(hooks | {"verdict": "", "on": on})
        yield told, found


def _growth(frame: pd.DataFrame, cfg: DictConfig) -> Iterator[tuple[dict[str, str], list[dict[str, str]]]]:
    """Yield how memory was to grow, with how it grew, by device."""
    measured = where(frame, part="resolution", batch=cfg.latency.target_batch)
    for model, (small, large) in cfg.latency.growth.items():
        limit, found = (large / small) ** 2, []
        for _, rows in where(measured, model=model).groupby(SETUP, sort=False, dropna=False):
            peaks = rows.pivot_table(index="side", columns="variant", values="peak_mib")
            extra = peaks.reindex(columns=[PLAIN, METHOD]).diff(axis="columns")[METHOD].reindex([small, large])
            if extra.notna().all():
                before, after = extra
                grown = after / before if before > 0 else math.inf if after > 0 else 0.0
                one = {"measured": f"x {grown:.2f} ({before:.0f} to {after:.0f} MiB)"}
                found.append(one | {"verdict": _verdict(grown, None, None, limit), "on": setup_of(rows.iloc[0])})
        yield {"what": f"extra peak memory, {large} against {small}", "of": model, "at most": f"x {limit:g}"}, found


def where(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows that hold these values, by column; that there is none is a value too."""
    for column, value in values.items():
        frame = frame[frame[column].isna() if pd.isna(value) else frame[column] == value]
    return frame


def _own_share(frame: pd.DataFrame, case: pd.Series) -> float | None:
    """Return what the host does for the method in a step outside the window, as a share of that step without."""
    same = where(frame, **case[MEASURED])
    hooks = where(same, part="profile", operation=OUTSIDE)["host_ms"].tolist()
    plain = where(same, part="table", variant=PLAIN)["outside_ms"].tolist()
    return hooks[0] / plain[0] if hooks and plain else None


def _verdict(value: float, low: float | None, high: float | None, limit: float) -> str:
    """Say whether a value is within its limit; an interval that holds the limit leaves it open."""
    low, high = (value, value) if pd.isna(low) else (low, high)
    return "met" if high <= limit else "not met" if low > limit else "undecided"


def _ratio(row: pd.Series, quantity: str, write: Callable[[float], str] = "{:.3f}".format) -> str:
    return with_interval(write, *_ends(row, quantity))


def _ends(row: pd.Series, quantity: str) -> list[float | None]:
    """Return a ratio and the ends of its interval; that of memory has none."""
    return [row.get(f"{quantity}_ratio{end}") for end in ("", "_low", "_high")]


def _step(row: pd.Series) -> str:
    return with_interval(_short, row["inside_ms"], row["inside_q1_ms"], row["inside_q3_ms"])


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _whole(value: float) -> str:
    return with_interval("{:.0f}".format, value)


def _short(value: float) -> str:
    """Write a positive number with three digits or, above 1000, as a whole one; others are noise around 0."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _missing(row: pd.Series) -> str:
    return OUT_OF_MEMORY if row["call_how"] == OUT_OF_MEMORY else ""


def _without_empty_columns(table: list[dict[str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(table).fillna("")
    return frame.loc[:, (frame != "").any()]


def render_page(frame: pd.DataFrame, cfg: DictConfig) -> str:
    """Return the page: targets, the table of every case, the curves, and the paper's statements.

    Args:
        frame: rows of latency.csv.
        cfg: the composed configuration: `name`, `description`, and of `latency` the titles and what was aimed at.
    """
    cases = []
    for plain, table in case_tables(frame, cfg.latency.titles):
        profile = where(frame, part="profile", **plain[MEASURED])
        cases.append((plain.to_dict(), setup_of(plain), table, profile_table(profile, plain) if len(profile) else None))
    return render(
        "timing/page.md.j2",
        cfg=cfg,
        cases=cases,
        targets=target_table(frame, cfg),
        scaling=scaling_table(frame, cfg.latency.titles),
        drawn=curve_models(frame),
        paper=paper_table(cfg.name).astype(object).fillna(""),
        markdown=markdown,
    )


def render_latex(frame: pd.DataFrame, cfg: DictConfig) -> str:
    """Return the tables of `render_page` that are ours as LaTeX."""
    titles = cfg.latency.titles
    cases = (table for _, table in case_tables(frame, titles))
    return latex([target_table(frame, cfg), *cases, scaling_table(frame, titles)])


def write(frame: pd.DataFrame, cfg: DictConfig, folder: Path) -> str:
    """Write `<folder>/<name>.md`, `.tex` and the figures of the curves; return the Markdown, see `render_page`."""
    page = render_page(frame, cfg)
    write_text(folder / f"{cfg.name}.md", page)
    write_text(folder / f"{cfg.name}.tex", render_latex(frame, cfg))
    for model in curve_models(frame):
        save(scaling(frame, model, cfg.latency.titles), folder / f"{cfg.name}_{model}")
    return page
