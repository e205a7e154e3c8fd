"""Gather all runs below a folder into one tidy table, for analyses of your own.

    python -m experiments collect                       # outputs/ -> outputs/collected.csv (and .parquet with pyarrow)
    python -m experiments collect FOLDER --to TABLE     # any folder, or a run's -> TABLE.csv ...

The table has one row per group and metric, with the run's settings, software, machine and commit, the metric and its
encoder, the group, and the value. A metric of the whole set of images has one row per run, without a group; so has a
metric whose groups have no numbers, such as an entropy. Groups without images have no row; the last column,
`n_withheld`, counts them.

`<table>_problems.csv` lists each file or folder that is left out, with the reason: damaged, half-finished and foreign
runs; scores of another version or of other images; runs without scores.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra.utils import get_class

from eval.files import canonical_json, read_document, write_bytes
from eval.images import METRICS
from eval.imageset import ImageSet
from experiments import PROJECT, project_path
from experiments.plan import experiments_of
from experiments.runs import catalogue
from experiments.runs.identity import GENERATION_VERSION
from experiments.runs.store import Run

#: Files of which a run folder has at least one, however damaged.
MARKS = ("config.yaml", "manifest.jsonl", "environment.json", "complete")
#: Columns before the settings, and where their values are in a run's identity.
HEAD = {
    "experiment": "experiment", "model": "request.model.name", "kind": "request.model.kind",
    "architecture": "request.model.architecture", "source": "request.model.source", "dtype": "request.model.dtype",
    "compile": "request.compile",
}  # fmt: skip
#: What the columns of the settings of the call and of the method begin with, and where these are.
SETTINGS = {"call.": "request.model.call.", "method.": "request.method.settings."}
#: Columns after the settings: of the run's identity and environment, of a metric's document, and of one of its groups.
RUN = {
    "prompts": "request.prompts.name", "split": "request.prompts.split", "run_id": "run_id", "weights": "weights",
    "code": "code", "device": "machine.device", "torch": "machine.torch", "diffusers": "machine.diffusers",
    "transformers": "machine.transformers", "cpu": "environment.cpu", "commit": "environment.commit",
    "date": "environment.date",
}  # fmt: skip
DOCUMENT = {
    "metric": "metric", "metric_version": "version", "encoder": "encoder.name", "encoder_id": "encoder.id",
    "unit": "unit", "higher_is_better": "higher_is_better", "aggregate": "aggregate",
}  # fmt: skip
GROUP = ["group", "prompt_id", "prompt", "category", "seed", "n_images", "value"]
#: A last column, where there are any: the groups of the run that the metric would be of, had they images.
N_WITHHELD = "n_withheld"
PROBLEMS = ["path", "problem"]


def collect(folder: str | Path = "outputs") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read all runs below a folder.

    Args:
        folder: where to look, at any depth, or a run's own; relative paths are relative to the project. Hidden folders
            are left out.

    Returns:
        The table, rows by run, metric and group; and the problems: `path` relative to the folder, and `problem`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = project_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of runs, got {folder}, which does not exist; check the path")
    metrics, names_of_experiments = metric_classes(), functools.cache(experiments_of)
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []

    @contextlib.contextmanager
    def refused(path: Path) -> Iterator[None]:
        """Note what keeps a run or a score from being taken: a foreign folder may hold anything."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"damaged or foreign: {type(error).__name__}: "
            problem = " ".join(f"{kind}{error}".split())
            problems.append({"path": path.relative_to(folder).as_posix(), "problem": problem})

    for place in run_folders(folder):
        with refused(place):
            if place != folder and place.is_symlink():
                raise ValueError("a link, which is not followed: collect the folder that it links to")
            run, images = _read_run(Run(place), names_of_experiments(place.parents[1]))
            files = sorted((place / METRICS).glob("*.json"))
            if not files:
                raise ValueError("not scored: run experiments.evaluate with its settings")
            for file in files:
                with refused(file):
                    rows += [run | row for row in _read_score(file, images, metrics)]
    names = {name for row in rows for name in row}
    head, tail = [*HEAD], [*RUN, *DOCUMENT, *GROUP, *({N_WITHHELD} & names)]
    settings = sorted(names - {*head, *tail})
    settings.sort(key=lambda name: not name.startswith("call."))
    table = pd.DataFrame(rows, columns=[*head, *settings, *tail], dtype=object)
    return table.apply(_typed), pd.DataFrame(problems, columns=PROBLEMS)


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield what is a run folder or was meant to be one, and links to folders, in the order of the paths."""
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        path = Path(place)
        signs = (re.fullmatch("[0-9a-f]{12}", path.name) is not None, any(mark in files for mark in MARKS))
        # The folder that was asked for is rather one of runs, unless all speaks for a run.
        if all(signs) if path == folder else any(signs):
            names.clear()
            yield path
        yield from (path / name for name in names if (path / name).is_symlink())


@functools.cache
def metric_classes() -> dict[str, set[type]]:
    """Return the classes of the metrics that conf/metric/ names; a name may have another one in another suite."""
    classes: dict[str, set[type]] = {}
    for file in sorted((PROJECT / "conf" / "metric").glob("*.yaml")):
        for name, spec in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if isinstance(spec, dict) and "_target_" in spec:
                classes.setdefault(name, set()).add(get_class(spec["_target_"]))
    return classes


def _read_run(run: Run, experiments: dict[str, list[str]]) -> tuple[dict[str, Any], ImageSet]:
    """Return what was run and where it comes from, by column, and the images of a complete run of this version."""
    if not (run.folder / "config.yaml").is_file():
        raise ValueError("damaged or foreign: expected a run folder, got one without config.yaml")
    identity, environment = run.identity, {"cpu": None, **run.environment}  # an earlier version recorded none
    request = identity["request"]
    names = " ".join(experiments.get(run.id, ())) or None
    values = _flat({"experiment": names, "run_id": run.id, "environment": environment, **identity})
    columns = {column: values[path] for column, path in (HEAD | RUN).items()} | {"method": request["method"]["name"]}
    for prefix, path in SETTINGS.items():
        columns |= {prefix + name.removeprefix(path): values[name] for name in values if name.startswith(path)}
    for setting in catalogue.settings():
        if len(setting.columns) == 2 and f"method.{setting.name}" in columns:
            cells = setting.cells({setting.name: columns.pop(f"method.{setting.name}")})
            columns |= {f"method.{column}": cell for column, cell in cells.items()}
    if not run.complete:
        n_done, n_all = len(list(run.folder.glob("images/*/[0-9]*/group.json"))), len(request["prompts"]["groups"])
        raise ValueError(f"half-finished: {n_done} of {n_all} groups; run experiments.generate with its settings again")
    if request["version"] != GENERATION_VERSION:
        raise ValueError(f"of another version: expected images of version {GENERATION_VERSION}; generate them again")
    run.check_manifest()
    images = ImageSet.open(run.folder)
    _ = images.manifest_hash  # all of them are here, and as they were
    return columns, images


def _read_score(file: Path, images: ImageSet, metrics: dict[str, set[Any]]) -> list[dict[str, Any]]:
    """Return what was measured, by column: a row a group, or one where groups have no number of their own."""
    document = read_document(file)
    name, version = document["metric"], document["version"]
    versions = {metric.version for metric in metrics.get(name, ())}
    if versions and version not in versions:
        expected = " or ".join(map(str, sorted(versions)))
        raise ValueError(f"of another version: expected {expected}, got {version}; evaluate again")
    measured = images.only(document.get("only"))
    if measured.manifest_hash != document["manifest_sha256"]:
        raise ValueError("stale: the images are others than those that were scored; evaluate again")
    values = _flat(document)
    columns = {column: values[path] for column, path in DOCUMENT.items()}
    if withheld := document.get("withheld"):
        columns[N_WITHHELD] = len(withheld)
    rows = []
    for group in document["groups"]:
        if "value" in group:
            row = columns | {key: group[key] for key in ("group", "category", "n_images", "value")}
            if group["group"] in measured.groups:  # no pool of groups, as a category's
                first = measured.rows[measured.groups[group["group"]][0]]
                row |= {"prompt_id": first.prompt_id, "prompt": first.prompt, "seed": first.group_seed}
            rows.append(row)
    return rows or [columns | {key: document[key] for key in ("n_images", "value")}]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return what is within a JSON object by its path, as `request.model.name`; anything deeper as it is."""
    return pd.json_normalize(values, max_level=3).to_dict("records")[0]


def _typed(column: pd.Series) -> pd.Series:
    """Give a column one type: truth values, whole numbers, numbers, or text; a format with types takes no mixture."""
    present = {type(value) for value in column.dropna()}
    for types, name in (({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")):
        if present and present <= types:
            return column.astype(name)
    text = column.map(
        lambda value: value if isinstance(value, str) else canonical_json(value, compact=True), na_action="ignore"
    )
    return text.astype("string")


def write(table: pd.DataFrame, problems: pd.DataFrame, to: Path) -> list[Path]:
    """Write `<to>.csv`, `<to>_problems.csv` and, where pyarrow is installed, `<to>.parquet`; return the files."""
    files = {".csv": table.to_csv(index=False).encode(), "_problems.csv": problems.to_csv(index=False).encode()}
    if importlib.util.find_spec("pyarrow"):
        files[".parquet"] = table.to_parquet(index=False)
    return [write_bytes(to.with_name(f"{to.name}{ending}"), content) for ending, content in files.items()]


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("collect", usage="python -m experiments collect [FOLDER] [--to TABLE] [--help]")
    parser.add_argument("folder", nargs="?", default="outputs")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args(argv)
    table, problems = collect(arguments.folder)
    files = write(table, problems, arguments.to or project_path(arguments.folder) / "collected")
    withheld = table.groupby("run_id")[N_WITHHELD].max().sum() if N_WITHHELD in table else 0
    note = f", {withheld} groups withheld" if withheld else ""
    print(f"{len(table)} rows of {table['run_id'].nunique()} runs, {len(problems)} problems{note}")
    for problem in problems.itertuples():
        print(f"left out: {problem.path}: {problem.problem}")
    for file in files:
        print(file)
