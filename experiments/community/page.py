"""The page of all results that people sent, results/community/README.md."""

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import write_text
from experiments.community.submission import read_submission, submission_files
from experiments.tables.columns import TEXT, correct_p_values, csv_text, markdown, printed, whole
from experiments.tables.pages import legend, main_table, scored_by
from experiments.tabulate import setting_columns

INTRODUCTION = """\
# Results from others

Other people made these runs on their machines. Our own tables do not contain them. `python -m experiments verify` has
recomputed the intervals, differences and tests from the values of groups in each file. It cannot recompute the values
themselves, because the images are not here. [CONTRIBUTING](../../CONTRIBUTING.md#send-a-result) says how to send one.
"""


def write_page(folder: Path) -> Path:
    """Write README.md of the submissions in a folder, which were checked, and return it."""
    submissions = [read_submission(file) for file in submission_files(folder)]
    submissions.sort(key=lambda submission: submission["baseline"] is not None)  # baselines stand first
    return write_text(folder / "README.md", render_page(submissions))


def render_page(submissions: Collection[Mapping[str, Any]]) -> str:
    """Return the page of all submissions: a section an experiment, small models apart from the others."""
    parts = [INTRODUCTION if submissions else f"{INTRODUCTION}\nNo result has come in yet.\n"]
    for experiment in sorted({submission["experiment"] for submission in submissions}):
        parts.append(f"## {experiment}\n")
        members = [submission for submission in submissions if submission["experiment"] == experiment]
        for small in (False, True):
            rows = [row for member in members if member["small_model"] is small for row in _rows(member)]
            if rows:
                frame = pd.read_csv(io.StringIO(csv_text(pd.DataFrame(rows))), dtype=TEXT)
                parts += ["### Small models\n"] if small else []
                parts.append(_section(whole(frame.sort_values(["model", "device"], kind="stable"))))
    return "\n".join(parts)


def _section(frame: pd.DataFrame) -> str:
    correct_p_values(frame)
    runs = frame.drop_duplicates("run_id")
    links = [f"[{row.run_id}]({row.experiment}-{row.run_id}.json)" for row in runs.itertuples()]
    sources = {"device": runs["device"].tolist(), "commit": runs["commit"].str[:8].tolist(), "run": links}
    table = printed(main_table(frame).assign(**sources).to_dict("records"))
    return f"{markdown(table)}\n\n{legend(frame)} {scored_by(frame)}\n"


def _rows(submission: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a submission's rows of a table, those of baselines first."""
    settings = submission["settings"]
    request = settings["request"]
    shared = {
        "experiment": submission["experiment"],
        "model": request["model"]["name"],
        "method": request["method"]["name"],
        **setting_columns(request["model"]["call"], request["method"]["settings"]),
        "run_id": submission["run_id"],
        "commit": submission["environment"]["commit"],
        "device": settings["machine"]["device"],
    }
    rows = []
    for score in submission["scores"]:
        document = score["document"]
        measured = {"metric": document["metric"], "encoder": document["encoder"]["id"], "primary": score["role"]}
        rows.append({**shared, **measured, "higher_is_better": document["higher_is_better"], **score["statistics"]})
    return rows
