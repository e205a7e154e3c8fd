"""Act 3: the JSONs of an experiment's runs become its table: CSV (one row a number), Markdown and LaTeX.

    python -m experiments.tabulate experiment=diversity

The overrides are those of `experiments.generate`. Rows of models that are not among them stay as they are in the CSV.
"""

from __future__ import annotations

import argparse
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

#: Columns that say which measured thing a row is; with the metric they are the row's key.
SETTING = [
    "model",
    "method",
    "matching",
    "reference",
    "alpha",
    "threshold",
    "t_low",
    "t_high",
    "guidance_scale",
    "steps",
]
COLUMNS = [
    "experiment", *SETTING, "metric", "encoder", "higher_is_better", "value", "ci_low", "ci_high",
    "difference", "difference_low", "difference_high", "n_groups", "n_images", "run_id", "commit", "device",
]  # fmt: skip


def rows_of(configs: list[DictConfig]) -> list[dict[str, Any]]:
    """Return one row for every run and metric, each with its paired difference to the run without a method.

    Args:
        configs: from `expand`; a run is paired with the one of method `none` that has the same model and prompts.

    Raises:
        FileNotFoundError: a run was not generated or not scored; the message names the command.
        ValueError: random weights, which measure nothing, would enter a table.
    """
    # A grid of the method's settings names its baseline over and over.
    runs = {run: cfg for cfg, run in ((cfg, Run.find(cfg)) for cfg in configs)}
    baselines = {_pairing(run): run for run in runs if run.identity["request"]["method"]["name"] == "none"}
    rows = []
    for run, cfg in runs.items():
        if cfg.model.kind == "tiny":
            raise ValueError(
                f"model={cfg.model.name} has random weights (kind: tiny): its numbers may not enter a table"
            )
        baseline = baselines.get(_pairing(run))
        for name, spec in cfg.metric.items():
            metric = instantiate(spec)
            reference = None if baseline in (None, run) else _document(baseline, name, metric)
            rows.append(_row(cfg, run, _document(run, name, metric), reference))
    return rows


def _pairing(run: Run) -> str:
    request = run.identity["request"]
    return repr((request["model"], request["prompts"], run.identity["weights"], run.identity["machine"]))


def _row(cfg: DictConfig, run: Run, document: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    options = dict(cfg.bootstrap)
    value, low, high = bootstrap_interval(document["groups"], document["aggregate"], **options)
    difference = difference_low = difference_high = None
    if reference is not None:
        difference, difference_low, difference_high, _ = paired_difference(
            document["groups"], reference["groups"], document["aggregate"], **options
        )
    settings = run.identity["request"]["method"]["settings"]
    window = settings.get("timestep_range") or (None, None)
    return {
        "experiment": cfg.name,
        "model": cfg.model.name,
        "method": cfg.method.name,
        **{key: settings.get(key) for key in ("matching", "reference", "alpha", "threshold")},
        "t_low": window[0],
        "t_high": window[1],
        "guidance_scale": cfg.model.call.guidance_scale,
        "steps": cfg.model.call.num_inference_steps,
        "metric": document["metric"],
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
        "run_id": run.id,
        "commit": run.environment["commit"],
        "device": run.environment["device"],
    }


def _document(run: Run, name: str, metric: Metric) -> dict[str, Any]:
    path = document_path(run, name, metric)
    document = read_document(path) if path.exists() else None
    if document is None or not is_current(document, metric, run.folder):
        state = "missing" if document is None else "of another version"
        raise FileNotFoundError(f"{path} is {state}: run python -m experiments.evaluate with the same overrides")
    return document


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the CSV at `path`: they replace the rows of the same models, the others stay."""
    new = pd.DataFrame(rows, columns=COLUMNS)
    if path.exists():
        old = pd.read_csv(path, dtype={"run_id": str})
        kept = old[~old["model"].isin(new["model"].unique())].reindex(columns=COLUMNS)
        if len(kept):
            new = pd.concat([kept.astype(object), new.astype(object)], ignore_index=True)
    write_text(path, new.to_csv(index=False, float_format="%.6g"))
    # Read back, so that a table made now and one made from the committed CSV are the same.
    return pd.read_csv(path, dtype={"run_id": str})


def _number(value: float, low: float, high: float, signed: bool = False) -> str:
    digits = 1 if abs(value) >= 10 else 3
    sign = "+" if signed else ""
    if pd.isna(value):
        return ""
    interval = "" if pd.isna(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{interval}"


def wide_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table people read: one row a run, one column a metric, `value (difference [interval])`."""
    table = []
    for _, group in frame.groupby([*SETTING, "run_id"], sort=False, dropna=False):
        first = group.iloc[0]
        entry = {
            "model": first["model"],
            "method": first["method"],
            "alpha": "" if pd.isna(first["alpha"]) else f"{first['alpha']:g}",
            "threshold": "" if pd.isna(first["threshold"]) else f"{first['threshold']:g}",
            "window": "" if pd.isna(first["t_low"]) else f"{first['t_high']:g} to {first['t_low']:g}",
        }
        for _, row in group.iterrows():
            arrow = {True: "up", False: "down"}.get(row["higher_is_better"], "-")
            change = _number(row["difference"], row["difference_low"], row["difference_high"], signed=True)
            cell = _number(row["value"], row["ci_low"], row["ci_high"]) if not change else f"{row['value']:.3f}"
            if abs(row["value"]) >= 10 and change:
                cell = f"{row['value']:.1f}"
            entry[f"{row['metric'].replace('_', ' ')} ({arrow})"] = f"{cell}; {change}" if change else cell
        entry["groups"] = int(first["n_groups"])
        entry["images"] = int(first["n_images"])
        table.append(entry)
    return pd.DataFrame(table).fillna("")


def paper_table(experiment: str, paper_csv: Path) -> pd.DataFrame:
    """Return the paper's own numbers for `experiment`, one row a method, as transcribed in results/paper.csv."""
    paper = pd.read_csv(paper_csv)
    paper = paper[paper["experiment"] == experiment]
    wide = paper.pivot_table(index=["model", "method"], columns="metric", values="value", sort=False).reset_index()
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
        "Without a method: value [95 % interval over groups]. With one: value; paired difference to the run without "
        f"[95 % bootstrap interval over the same groups]. Scored by {encoders}. Models named mini-* are this project's "
        "small models: their numbers are not SDXL's or Flux's.",
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
    print(tabulate(arguments.overrides))
    cfg = expand(arguments.overrides)[0]
    for suffix in ("csv", "md", "tex"):
        print(project_path(cfg.results) / f"{cfg.name}.{suffix}")


if __name__ == "__main__":
    main()
