"""Act 3: the JSONs of an experiment's runs become its table: CSV (one row a number), Markdown and LaTeX.

    python -m experiments.tabulate experiment=diversity

The overrides are those of `experiments.generate`. Rows of models that are not among them stay as they are in the CSV.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from eval.images import write_text
from eval.intervals import bootstrap_interval, paired_difference
from eval.metrics import Metric, is_current, read_document
from experiments import project_path
from experiments.configs import expand
from experiments.evaluate import document_path
from experiments.runs import Run

#: Columns of a CSV that hold text also where they look like numbers.
TEXT = {"run_id": str, "commit": str}
#: Columns that say which measured thing a row is; with the metric and its encoder they are the row's key.
SETTING = [
    "model", "guidance_scale", "true_cfg_scale", "steps", "method", "matching", "reference", "alpha", "threshold",
    "t_low", "t_high",
]  # fmt: skip
KEY = ["experiment", *SETTING, "metric", "encoder"]
COLUMNS = [
    *KEY, "higher_is_better", "value", "ci_low", "ci_high", "difference", "difference_low", "difference_high",
    "n_groups", "n_images", "pushed_share", "run_id", "commit", "device",
]  # fmt: skip


def rows_of(configs: list[DictConfig]) -> list[dict[str, Any]]:
    """Return one row for every run and metric, each with its paired difference to the run without a method.

    Args:
        configs: from `expand`; a run is paired with the one of method `none` that is otherwise as configured.

    Raises:
        FileNotFoundError: a run or its baseline was not generated or not scored; the message names the command.
        ValueError: random weights, which measure nothing, would enter a table.
    """
    # A grid of the method's settings names its baseline over and over.
    runs = {run: cfg for cfg, run in ((cfg, Run.find(cfg)) for cfg in configs)}
    rows = []
    for run, cfg in runs.items():
        if cfg.model.kind == "tiny":
            raise ValueError(
                f"model={cfg.model.name} has random weights (kind: tiny): its numbers may not enter a table"
            )
        baseline = Run.find_baseline(cfg)
        for name, spec in cfg.metric.items():
            metric = instantiate(spec)
            reference = None if baseline == run else _document(baseline, name, metric)
            rows.append(_row(cfg, run, name, _document(run, name, metric), reference))
    return rows


def _row(
    cfg: DictConfig, run: Run, name: str, document: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    options = dict(cfg.bootstrap)
    value, low, high = bootstrap_interval(document["groups"], document["aggregate"], **options)
    difference = difference_low = difference_high = None
    if reference is not None:
        difference, difference_low, difference_high, _ = paired_difference(
            document["groups"], reference["groups"], document["aggregate"], **options
        )
    settings = run.identity["request"]["method"]["settings"]
    window = settings.get("timestep_range") or (None, None)
    statistics = run.statistics()
    compared = sum(group.get("tokens_compared", 0) for group in statistics)
    return {
        "experiment": cfg.name,
        "model": cfg.model.name,
        "guidance_scale": cfg.model.call.guidance_scale,
        "true_cfg_scale": cfg.model.call.get("true_cfg_scale"),
        "steps": cfg.model.call.num_inference_steps,
        "method": cfg.method.name,
        **{key: settings.get(key) for key in ("matching", "reference", "alpha", "threshold")},
        "t_low": window[0],
        "t_high": window[1],
        "metric": name,
        "encoder": document["encoder"]["id"],
        "higher_is_better": document["higher_is_better"],
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "difference": difference,
        "difference_low": difference_low,
        "difference_high": difference_high,
        "n_groups": document["n_groups"],
        "n_images": document["n_images"],
        "pushed_share": sum(group["tokens_pushed"] for group in statistics) / compared if compared else None,
        "run_id": run.id,
        "commit": run.environment["commit"],
        "device": run.identity["machine"]["device"],
    }


def _document(run: Run, name: str, metric: Metric) -> dict[str, Any]:
    path = document_path(run, name, metric)
    document = read_document(path) if path.exists() else None
    if document is None or not is_current(document, metric, run.folder):
        state = "missing" if document is None else "of another version"
        raise FileNotFoundError(f"{path} is {state}: run python -m experiments.evaluate with the same overrides")
    return document


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the CSV at `path`: they replace the rows with their `KEY`, all others stay.

    Returns:
        The CSV's content, read back: a table made now and one made from the committed file are the same.
    """
    new = pd.DataFrame(rows, columns=COLUMNS)
    frame = pd.read_csv(io.StringIO(_csv(new)), dtype=TEXT)
    if path.exists():
        old = pd.read_csv(path, dtype=TEXT).reindex(columns=COLUMNS)
        replaced = set(map(repr, frame[KEY].values.tolist()))
        kept = old[[repr(key) not in replaced for key in old[KEY].values.tolist()]]
        if len(kept):
            frame = pd.concat([kept.astype(object), frame.astype(object)], ignore_index=True)
    write_text(path, _csv(frame))
    return pd.read_csv(path, dtype=TEXT)


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g")


def _number(value: float, low: float, high: float, sign: str = "") -> str:
    """Return `value [low, high]` with three decimals, one where the value is 10 or more."""
    digits = 1 if abs(value) >= 10 else 3
    interval = "" if pd.isna(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{interval}"


def wide_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table people read: one row a run, one column a metric (and encoder, where it has several)."""
    several = frame.groupby("metric")["encoder"].nunique() > 1
    table = []
    for _, group in frame.groupby([*SETTING, "run_id"], sort=False, dropna=False):
        first = group.iloc[0]
        entry = {
            "model": first["model"],
            "method": first["method"],
            "alpha": "" if pd.isna(first["alpha"]) else f"{first['alpha']:g}",
            "threshold": "" if pd.isna(first["threshold"]) else f"{first['threshold']:g}",
            "window": "" if pd.isna(first["t_low"]) else f"{first['t_high']:g} to {first['t_low']:g}",
            "pushed": "" if pd.isna(first["pushed_share"]) else f"{100 * first['pushed_share']:.0f} %",
        }
        for _, row in group.iterrows():
            arrow = {True: "up", False: "down"}.get(row["higher_is_better"], "-")
            by = f" by {row['encoder']}" if several[row["metric"]] else ""
            cell = _number(row["value"], row["ci_low"], row["ci_high"])
            if not pd.isna(row["difference"]):
                digits = 1 if abs(row["value"]) >= 10 else 3
                change = _number(row["difference"], row["difference_low"], row["difference_high"], "+")
                cell = f"{row['value']:.{digits}f}; {change}"
            entry[f"{row['metric'].replace('_', ' ')}{by} ({arrow})"] = cell
        entry["groups"] = int(first["n_groups"])
        entry["images"] = int(first["n_images"])
        table.append(entry)
    return pd.DataFrame(table).fillna("")


def findings(frame: pd.DataFrame, metrics: tuple[str, ...] = ("pairwise_distance", "clip_score")) -> list[str]:
    """Say in words, from the numbers alone, what each method did to each of `metrics` on each model."""
    lines = []
    for (model, method, *_), rows in frame.groupby(["model", "method", "run_id"], sort=False):
        parts = []
        for _, row in rows[rows["metric"].isin(metrics) & rows["difference"].notna()].iterrows():
            low, high = row["difference_low"], row["difference_high"]
            verb = "raised" if low > 0 else "lowered" if high < 0 else "did not measurably change"
            change = _number(row["difference"], low, high, "+")
            base = row["value"] - row["difference"]
            parts.append(f"{verb} the {row['metric'].replace('_', ' ')} by {change} ({row['difference'] / base:+.1%})")
        if parts:
            lines.append(f"- {model}, {method}: " + "; ".join(parts) + f" (n = {rows['n_groups'].iloc[0]} groups).")
    return lines


def paper_table(experiment: str, paper_csv: Path) -> pd.DataFrame:
    """Return the paper's own numbers for `experiment`, one row a method, as transcribed in results/paper.csv."""
    paper = pd.read_csv(paper_csv)
    paper = paper[paper["experiment"] == experiment]
    wide = paper.pivot_table(index=["table", "model", "method"], columns="metric", values="value", sort=False)
    wide = wide.reset_index().rename(columns={"table": "source"})
    wide.columns.name = None
    return wide


def render_markdown(frame: pd.DataFrame, description: str | None, paper: pd.DataFrame) -> str:
    """Return the Markdown page of one experiment: ours, how it was measured, and the paper's beside it."""
    name = frame["experiment"].iloc[0]
    encoders = ", ".join(sorted(frame["encoder"].dropna().unique()))
    parts = [f"# {name}", ""]
    if description:
        parts += [description, ""]
    parts += [
        wide_table(frame).to_markdown(index=False, disable_numparse=True),
        "",
        "Without a method: value [95 % interval over groups]. With one: value; paired difference to the run without, "
        "over the same groups [95 % centred bootstrap interval]. pushed: share of the compared tokens that moved. "
        f"Scored by {encoders}. Models named mini-* are this project's small models: their numbers are not SDXL's or "
        "Flux's.",
        "",
        *findings(frame),
        "",
    ]
    if len(paper):
        parts += [
            "The paper's own numbers (results/paper.csv; DreamSim similarity, other models, other images: not the same "
            "scale as above):",
            "",
            paper.to_markdown(index=False, disable_numparse=True),
            "",
        ]
    return "\n".join(parts)


def tabulate(overrides: list[str]) -> str:
    """Write `<results>/<experiment>.csv`, `.md` and `.tex` for the runs of `overrides`; return the Markdown."""
    configs = expand(overrides)
    cfg = configs[0]
    folder = project_path(cfg.results)
    folder.mkdir(parents=True, exist_ok=True)
    frame = merge_rows(folder / f"{cfg.name}.csv", rows_of(configs))
    markdown = render_markdown(frame, cfg.description, paper_table(cfg.name, project_path("results/paper.csv")))
    write_text(folder / f"{cfg.name}.md", markdown)
    latex = wide_table(frame).map(lambda cell: str(cell).replace("_", r"\_")).to_latex(index=False)
    write_text(folder / f"{cfg.name}.tex", latex)
    return markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for experiments.generate")
    arguments = parser.parse_args()
    try:
        print(tabulate(arguments.overrides))
    except FileNotFoundError as error:  # it says what to do; a traceback would bury that
        raise SystemExit(str(error)) from None
    cfg = expand(arguments.overrides)[0]
    for suffix in ("csv", "md", "tex"):
        print(project_path(cfg.results) / f"{cfg.name}.{suffix}")


if __name__ == "__main__":
    main()
