"""Gather all runs below a folder into one tidy table, for any analysis that no experiment here foresaw.

    python -m experiments.collect                       # outputs/ -> outputs/collected.csv (and .parquet with pyarrow)
    python -m experiments.collect FOLDER --to TABLE     # any folder -> TABLE.csv ...

One row a group and metric: what was run (experiment, model, call, method with all settings, prompts, split), where it
comes from (run id, weights, code, software, device, commit), what was measured (metric, encoder, unit, direction), of
what (group, prompt, category, seed, number of images), and the value. A metric of the whole set has one row a run,
without a group, and so has one whose groups have no number of their own, as an entropy.

What cannot be taken is in `<table>_problems.csv`, a line a file or folder with the reason: damaged, half-finished and
foreign runs; scores of another version or of other images than there are now; runs that were not scored. Pages of
experiments.report hold copies of images in folders of runs' names, and are left out.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import importlib.util
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra.utils import get_class

from eval.files import write_bytes, write_text
from eval.images import METRICS, ManifestRow, group_rows, read_manifest, rows_hash
from eval.measure import read_document
from experiments import PROJECT, catalogue, project_path
from experiments.runs import GENERATION_VERSION, Run, canonical

#: Files of which a run folder has at least one, however damaged.
MARKS = ("config.yaml", "manifest.jsonl", "environment.json", "complete")
#: Columns of the table; settings of the call and the method stand between, as `call.NAME` and `method.NAME`.
HEAD = ["experiment", "model", "kind", "architecture", "source", "dtype", "compile"]
TAIL = [
    "prompts", "split", "run_id", "weights", "code", "device", "torch", "diffusers", "transformers", "cpu", "commit",
    "date", "metric", "metric_version", "encoder", "encoder_id", "unit", "higher_is_better", "aggregate", "group",
    "prompt_id", "prompt", "category", "seed", "n_images", "value",
]  # fmt: skip
PROBLEMS = ["path", "problem"]


def collect(folder: str | Path = "outputs") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read all runs below a folder.

    Args:
        folder: where to look, at any depth, or a run's own; relative paths are relative to the project. Hidden folders
            and reports are left out.

    Returns:
        The table, rows by run, metric and group; and the problems: `path` relative to the folder, and `problem`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = project_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of runs, got {folder}, which does not exist; check the path")
    versions = metric_versions()
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []
    for place in run_folders(folder):
        if place != folder and place.is_symlink():
            reason = "a link, which is not followed: collect the folder that it links to"
            problems.append({"path": place.relative_to(folder).as_posix(), "problem": reason})
            continue
        for found in _rows(place, versions):
            if isinstance(found, Problem):
                path = (place / found.file).relative_to(folder).as_posix()
                problems.append({"path": path, "problem": found.reason})
            else:
                rows.append(found)
    settings = sorted({name for row in rows for name in row} - {*HEAD, *TAIL})
    settings.sort(key=lambda name: not name.startswith("call."))
    table = pd.DataFrame(rows, columns=[*HEAD, *settings, *TAIL], dtype=object)
    return table.apply(_typed), pd.DataFrame(problems, columns=PROBLEMS)


class Problem:
    """A file of a run, or the run itself (""), that cannot be taken, and why."""

    def __init__(self, file: str, reason: str) -> None:
        self.file = file
        self.reason = " ".join(reason.split())


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
        elif "index.html" in files and _is_report(path / "index.html"):
            names.clear()
        yield from (path / name for name in names if (path / name).is_symlink())


def _is_report(page: Path) -> bool:
    from experiments.report import MARK  # loads all that draws, which nothing else here needs

    if not page.is_file():
        return False
    with page.open("rb") as file:
        return MARK.encode() in file.read(1 << 16)


def metric_versions() -> dict[str, set[int]]:
    """Return the versions of the metrics that conf/metric/ names, which one name may have in several suites."""
    versions: dict[str, set[int]] = {}
    for file in sorted((PROJECT / "conf" / "metric").glob("*.yaml")):
        for name, spec in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if isinstance(spec, dict) and "_target_" in spec:
                versions.setdefault(name, set()).add(get_class(spec["_target_"]).version)
    return versions


def _rows(folder: Path, versions: dict[str, set[int]]) -> Iterator[dict[str, Any] | Problem]:
    """Yield a run's rows, and what is wrong with it; never raise for what lies in the folder."""
    run = Run(folder)
    try:
        if not (folder / "config.yaml").is_file():
            yield Problem("", "damaged or foreign: expected a run folder, got one without config.yaml")
            return
        about = _about(run)
    except Exception as error:  # a foreign folder may hold anything
        yield Problem("", f"damaged or foreign: {type(error).__name__}: {error}")
        return
    if not run.complete:
        n_done, n_all = len(list(folder.glob("images/*/[0-9]*/group.json"))), about.pop("n_groups")
        yield Problem(
            "", f"half-finished: {n_done} of {n_all} groups; run experiments.generate with its settings again"
        )
        return
    del about["n_groups"]
    if about.pop("version") != GENERATION_VERSION:
        yield Problem("", f"of another version: expected images of version {GENERATION_VERSION}; generate them again")
        return
    try:
        run.check_manifest()
        manifest = read_manifest(folder)
        rows_hash(folder, manifest)
    except Exception as error:
        yield Problem("", f"damaged: {error}")
        return
    files = sorted((folder / METRICS).glob("*.json"))
    if not files:
        yield Problem("", "not scored: run experiments.evaluate with its settings")
    for file in files:
        try:
            yield from _rows_of_document(file, manifest, about, versions)
        except Exception as error:
            yield Problem(f"{METRICS}/{file.name}", f"damaged: {type(error).__name__}: {error}")


def _about(run: Run) -> dict[str, Any]:
    """Return the columns that say what was run and where it comes from; `version` and `n_groups` beside them."""
    identity, environment = run.identity, run.environment
    asked = identity["request"]
    model, method, prompts = asked["model"], asked["method"], asked["prompts"]
    return {
        "experiment": run.folder.parents[2].name,
        "model": model["name"],
        **{name: model[name] for name in ("kind", "architecture", "source", "dtype")},
        "compile": asked["compile"],
        **{f"call.{name}": _flat(value) for name, value in model["call"].items()},
        **_settings(method),
        "prompts": prompts["name"],
        "split": prompts["split"],
        "run_id": run.id,
        **{name: identity[name] for name in ("weights", "code")},
        **{name: identity["machine"][name] for name in ("device", "torch", "diffusers", "transformers")},
        "commit": environment["commit"],
        "date": environment["date"],
        "cpu": environment.get("cpu"),
        "version": asked["version"],
        "n_groups": len(prompts["groups"]),
    }


def _settings(method: dict[str, Any]) -> dict[str, Any]:
    """Return a method's name and settings as columns; a range as two numbers."""
    ranges = {setting.name: setting for setting in catalogue.settings() if len(setting.columns) == 2}
    columns = {"method": method["name"]}
    for name, value in method["settings"].items():
        cells = ranges[name].cells(method["settings"]) if name in ranges else {name: _flat(value)}
        columns |= {f"method.{column}": cell for column, cell in cells.items()}
    return columns


def _flat(value: Any) -> Any:
    """Return what fits into a cell: numbers and texts as they are, anything within anything as JSON."""
    return canonical(value) if isinstance(value, (dict, list)) else value


def _rows_of_document(
    file: Path, manifest: list[ManifestRow], about: dict[str, Any], versions: dict[str, set[int]]
) -> Iterator[dict[str, Any] | Problem]:
    document = read_document(file)
    name, problem = document["metric"], f"{METRICS}/{file.name}"
    if document["version"] not in versions.get(name, {document["version"]}):
        known = " or ".join(str(version) for version in sorted(versions[name]))
        yield Problem(problem, f"of another version: expected {known}, got {document['version']}; evaluate again")
        return
    only = document.get("only")
    measured = [row for row in manifest if only is None or any(fnmatchcase(row.prompt_id, one) for one in only)]
    if rows_hash(file.parents[1], measured) != document["manifest_sha256"]:
        yield Problem(problem, "stale: the images are others than those that were scored; evaluate again")
        return
    common = about | {
        "metric": name,
        "metric_version": document["version"],
        "encoder": document["encoder"]["name"],
        "encoder_id": document["encoder"]["id"],
        **{key: document[key] for key in ("unit", "higher_is_better", "aggregate")},
    }
    groups = group_rows(measured)
    rows = [
        common
        | {
            "group": group["group"],
            **_of_group(groups, group["group"]),
            "category": group["category"],
            "n_images": group["n_images"],
            "value": float(group["value"]),
        }
        for group in document["groups"]
        if "value" in group
    ]
    yield from rows or [common | {"n_images": document["n_images"], "value": float(document["value"])}]


def _of_group(groups: dict[str, list[ManifestRow]], name: str) -> dict[str, Any]:
    """Return a group's prompt and seed; nothing of pools of groups, as a category's."""
    if name not in groups:
        return {}
    first = groups[name][0]
    return {"prompt_id": first.prompt_id, "prompt": first.prompt, "seed": first.group_seed}


def _typed(column: pd.Series) -> pd.Series:
    """Give a column one type: truth values, whole numbers, numbers, or text; a format with types takes no mixture."""
    found = {type(value) for value in column.dropna()}
    for types, name in (({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")):
        if found and found <= types:
            return column.astype(name)
    text = column.map(lambda value: value if isinstance(value, str) else canonical(value), na_action="ignore")
    return text.astype("string")


def write(table: pd.DataFrame, problems: pd.DataFrame, to: Path) -> list[Path]:
    """Write `<to>.csv`, `<to>_problems.csv` and, where pyarrow is installed, `<to>.parquet`; return the files."""
    files = [
        write_text(to.with_name(f"{to.name}.csv"), table.to_csv(index=False)),
        write_text(to.with_name(f"{to.name}_problems.csv"), problems.to_csv(index=False)),
    ]
    if importlib.util.find_spec("pyarrow"):
        files.insert(1, write_bytes(to.with_name(f"{to.name}.parquet"), table.to_parquet(index=False)))
    return files


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("collect", usage="python -m experiments collect [FOLDER] [--to TABLE] [--help]")
    parser.add_argument("folder", nargs="?", default="outputs", help="where the runs lie, or a run (default: outputs)")
    parser.add_argument("--to", type=Path, help="the table, without a suffix (default: collected, in the folder)")
    arguments = parser.parse_args(argv)
    table, problems = collect(arguments.folder)
    files = write(table, problems, arguments.to or project_path(arguments.folder) / "collected")
    print(f"{len(table)} rows of {table['run_id'].nunique()} runs, {len(problems)} problems")
    for problem in problems.itertuples():
        print(f"not taken: {problem.path}: {problem.problem}")
    for file in files:
        print(file)
