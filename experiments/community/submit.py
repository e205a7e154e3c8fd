"""Write your scored runs as files that you can send: one JSON file for each run, without images.

    python -m experiments submit experiment=diversity
    python -m experiments submit experiment=diversity --every-eval-ever FOLDER

It takes the runs of `outputs/diversity/plan.json`, which must be scored and tabulated, from whatever model they are;
outputs=FOLDER and results=FOLDER say where else they lie. The files go to results/community/, or to --to FOLDER, and
CONTRIBUTING.md says how to send them. Each has the settings, commit, versions, device, seeds, digests of weights and
images, and the value of every group. What `python -m experiments verify` would refuse is not written.
With --every-eval-ever, the numbers are also written in the format of Every Eval Ever.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from eval.files import canonical_json, read_document, with_checksum, write_text
from eval.images import METRICS, scores_path
from eval.imageset import ImageSet
from experiments import project_path
from experiments.community.every_eval_ever import write_export
from experiments.community.page import write_page
from experiments.community.submission import COMMUNITY, documents_of, file_name, is_small
from experiments.community.verify import find_faults, recomputed
from experiments.plan import PLAN, Plan, RunSpec
from experiments.runs.store import Run
from experiments.tables.columns import ROLES, STATISTICS, read_table

#: Settings that say where the runs and their table are; the plan says everything else.
PLACES = ("outputs", "results")
#: Digits of a table, as the largest deviation of a number in it from the same number in full.
TABLE_PRECISION = 1e-5


def plan_of(overrides: list[str]) -> Plan:
    """Read the plan that `generate` wrote for an experiment.

    Raises:
        FileNotFoundError: there is none.
        ValueError: an override is no experiment and no place.
    """
    places = dict(override.partition("=")[::2] for override in overrides)
    name = places.pop("experiment", "")
    if not name or set(places) - set(PLACES):
        raise ValueError(
            f"expected experiment=NAME, and outputs=FOLDER and results=FOLDER if you changed them, got "
            f"{' '.join(overrides) or 'none'}: the plan of the last generate says the rest"
        )
    file = project_path(places.get("outputs", "outputs")) / name / PLAN
    return Plan.of([f"plan={file}", *([f"results={places['results']}"] if "results" in places else [])])


def submissions_of(plan: Plan) -> list[dict[str, Any]]:
    """Return a submission for each run of a plan, those of baselines before the others.

    Raises:
        FileNotFoundError: a run is not complete, not scored or not tabulated.
        ValueError: images, scores or numbers of the table are not as they were written.
    """
    table = read_table(plan.name, plan.results)
    submissions: dict[str, dict[str, Any]] = {}
    for spec in plan.specs:
        run, baseline = Run.of(spec), Run.of(spec.baseline)
        if run.id not in submissions:
            rows = table[table["run_id"] == run.id]
            submissions[run.id] = _submission(spec, run, rows, submissions.get(baseline.id))
    return list(submissions.values())


def _submission(spec: RunSpec, run: Run, rows: pd.DataFrame, baseline: dict[str, Any] | None) -> dict[str, Any]:
    """Return the submission of a run.

    Args:
        spec, run: the run.
        rows: its rows of the experiment's table.
        baseline: the submission of the run that it is compared with.
    """
    if rows.empty:
        raise FileNotFoundError(
            f"expected {spec.label} ({run.id}) in the table of {spec.cfg.name}, got no row: run "
            "python -m experiments tabulate with the same overrides"
        )
    images = ImageSet.open(run.folder)
    _ = images.manifest_hash  # which raises an error if an image is not as it was generated
    submission = {
        "format": 1,
        "experiment": spec.cfg.name,
        "run_id": run.id,
        "small_model": is_small(run.identity),
        "settings": run.identity,
        "environment": run.environment,
        "baseline": baseline and {key: baseline[key] for key in ("run_id", "sha256")},
        "bootstrap": OmegaConf.to_container(spec.cfg.bootstrap),
        "primary": {"quality_margin": OmegaConf.to_container(spec.cfg.primary)["quality_margin"]},
        "images": [row.to_dict() for row in images.rows],
        "withheld": [row.to_dict() for row in images.withheld],
        "scores": [],
    }
    references = documents_of(baseline)
    for _, row in rows.iterrows():
        document = read_document(scores_path(run.folder / METRICS, row["metric"], row["encoder"]))
        score = {"role": row["primary"] if row["primary"] in ROLES else None, "document": document}
        score["statistics"] = recomputed(submission, score, references.get(row["metric"]))
        _check_row(row, score["statistics"])
        submission["scores"].append(score)
    return with_checksum(submission)


def _check_row(row: pd.Series, statistics: dict[str, Any]) -> None:
    """Raise ValueError if a row of the table has other numbers than follow from the run's scores."""
    for name in (name for name in STATISTICS if name in statistics):
        value = statistics[name]
        printed = None if pd.isna(row[name]) else row[name]
        if value is None or printed is None:
            agrees = value is printed
        else:
            agrees = abs(value - printed) <= TABLE_PRECISION * abs(value)
        if not agrees:
            raise ValueError(
                f"expected {name} of {row['metric']} of run {row['run_id']} in the table as its scores say, {value}, "
                f"got {printed}: run python -m experiments tabulate with the same overrides"
            )


def write_submissions(submissions: list[dict[str, Any]], folder: Path) -> tuple[list[Path], list[str]]:
    """Write submissions into a folder, unless one of them would be refused.

    Returns:
        The files, and the faults, one a line. One of the two is empty.
    """
    texts = {file_name(submission): canonical_json(submission) + "\n" for submission in submissions}
    with tempfile.TemporaryDirectory() as scratch:
        files = [write_text(Path(scratch) / name, text) for name, text in texts.items()]
        faults = [f"{file.name}: {fault}" for file in files for fault in find_faults(file)]
    if faults:
        return [], faults
    return [write_text(folder / name, text) for name, text in texts.items()], []


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("submit", add_help=False)
    parser.add_argument("--to", type=Path, default=COMMUNITY)
    parser.add_argument("--every-eval-ever", type=Path, metavar="FOLDER")
    arguments, overrides = parser.parse_known_args(argv)
    submissions = submissions_of(plan_of(overrides))
    files, faults = write_submissions(submissions, arguments.to)
    if not faults:
        files.append(write_page(arguments.to))
    if not faults and arguments.every_eval_ever is not None:
        files += [write_export(submission, arguments.every_eval_ever) for submission in submissions]
    print(*files, *faults, sep="\n")
    return int(bool(faults))
