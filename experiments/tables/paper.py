"""The paper's table, with our runs below each of its rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from experiments import project_path
from experiments.tables.columns import DIFFERENCE, markdown
from experiments.tables.pages import cell, run_labels, title_of
from experiments.tables.templates import render

#: Rows of the paper's table, and the methods whose runs stand below each.
ROWS = {
    "base prompt": ("none",),
    "base prompt + NegToMe": ("negtome", "negtome_released"),
    "prompt rewriting (gpt-4o)": ("rewriting",),
    "prompt rewriting + NegToMe": ("rewriting_and_negtome",),
}
#: The page's file.
COMPARISON = "comparison.md"
UNKNOWN = "not available"


class Measure(NamedTuple):
    """A number that can stand below the paper's.

    Attributes:
        metric: of conf/metric/paper.yaml.
        encoder: how the id of the paper's network begins.
        better: "up" or "down".
        scale: the paper's unit over that of the metric.
    """

    metric: str
    encoder: str
    better: str
    scale: float = 1.0


#: By the column's heading, in results/paper.csv where the paper has the number.
MEASURES = {
    "DreamSim similarity": Measure("released_dreamsim", "dreamsim-ensemble-", "down"),
    "CLIPScore / 100": Measure("clip_score", "open_clip-ViT-B-32-quickgelu-openai-", "up", 0.01),
    "Inception Score": Measure("released_inception_score", "inception-torchvision-", "up"),
    "FID": Measure("released_fid", "inception-released-", "down"),
    "KID": Measure("kid", "inception-antialiased-", "down"),
    "precision": Measure("precision", "inception-antialiased-", "up"),
}
SECONDS = "seconds"


def comparison_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's rows, each followed by the runs of its methods.

    A cell of ours is filled only if the paper's own network measured it. A run without any such cell has no row, and no
    run of a mini model has one.

    Args:
        frame: the experiment's CSV.

    Returns:
        A table of texts: the source, method, model, number of images, the measures and the seconds.
    """
    published = _published()
    compared, labels = _compared(frame), run_labels(frame)
    rows = []
    for method, entries in published.groupby("method", sort=False):
        values = dict(zip(entries["metric"], entries["value"], strict=True))
        head = {"source": "the paper", "method": method, "model": entries["model"].iloc[0], "images": UNKNOWN}
        rows.append(head | values)
        ours = compared[compared["method"].isin(ROWS[method])]
        for run_id, run in ours.groupby("run_id", sort=False):
            first = run.iloc[0]
            name = f"{title_of(first['method'])} {labels[run_id].removeprefix(first['method']).strip()}".strip()
            images = f"{run['n_images'].max():.0f}"
            rows.append({"source": "ours", "method": name, "model": first["model"], "images": images, **_cells(run)})
    measured = [heading for heading in (*MEASURES, SECONDS) if any(heading in row for row in rows)]
    table = pd.DataFrame(rows, columns=["source", "method", "model", "images", *measured])
    is_paper = table["source"] == "the paper"
    table[is_paper] = table[is_paper].fillna(UNKNOWN)
    arrows = {heading: measure.better for heading, measure in MEASURES.items()} | {SECONDS: "down"}
    return table.fillna("").rename(columns={heading: f"{heading} ({arrows[heading]})" for heading in measured})


def render_comparison(frame: pd.DataFrame) -> str:
    """Return the page of `comparison_table`, which says in what our rows differ from the paper's."""
    compared = _compared(frame)
    return render(
        "experiments/tables/comparison.md.j2",
        experiment=frame["experiment"].iloc[0],
        table=markdown(comparison_table(frame)) if len(compared) else "",
        source=_published()["table"].iloc[0],
        devices=", ".join(compared["device"].unique()),
        left_out=", ".join(model for model in frame["model"].unique() if model not in set(compared["model"])),
    )


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the runs that may stand below the paper's.

    A mini model is left out by its name too: it may be scored by CLIP ViT-B/32, as any images can.
    """
    real = frame[~frame["model"].str.startswith("mini")]
    return real[real["run_id"].isin([run_id for run_id, run in real.groupby("run_id") if _cells(run)])]


def _published() -> pd.DataFrame:
    """Return the rows of results/paper.csv of the comparison, as typed."""
    paper = pd.read_csv(project_path("results/paper.csv"), dtype=str)
    return paper[paper["experiment"] == "diversity"]


def _cells(run: pd.DataFrame) -> Mapping[str, Any]:
    """Return a run's cells by heading; {} if none of its numbers is by a network of the paper's."""
    rows = {row["metric"]: row for _, row in run.iterrows()}
    cells = {}
    for heading, measure in MEASURES.items():
        row = rows.get(measure.metric)
        if row is None or pd.isna(row["value"]) or not row["encoder"].startswith(measure.encoder):
            continue
        scaled = row.copy()
        scaled[["value", "ci_low", "ci_high", *DIFFERENCE]] *= measure.scale
        cells[heading] = cell(scaled)
    seconds = run["seconds"].iloc[0]
    return cells | {SECONDS: f"{seconds:.2f}"} if cells and not pd.isna(seconds) else cells
