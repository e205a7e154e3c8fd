"""Act 5: all tables, figures and images become one page, read in a browser without a server or a network.

    python -m experiments report [--results FOLDER] [--outputs FOLDER] [--into FOLDER] [--groups 40] [--single-file]

It shows the tables of `--results` (default: those made here, outputs/results; where there are none, the published
ones, results), and of each table's runs the images that are on this machine, at most `--groups` groups a model.
Reduced copies of them lie beside the page, so that its folder (default: outputs/report) can be moved or sent as it
is; with `--single-file` they are in the page itself. Equal inputs give equal bytes.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from omegaconf import OmegaConf

from eval.files import write_text
from experiments import PROJECT, project_path
from experiments.figures import called_for
from experiments.figures.style import encode
from experiments.latency.report import target_table
from experiments.latency.rows import MEASURED
from experiments.plan import first
from experiments.report.galleries import gallery, read_runs
from experiments.report.opening import clearest, sheet, verdicts
from experiments.report.pictures import PICTURES, Pictures, is_elsewhere, kept
from experiments.report.words import cell_lines, read_page
from experiments.runs.locks import locked
from experiments.tables import pages
from experiments.tables.columns import REQUIRED, commands, printed, read_csv, read_table, spelled
from experiments.tables.templates import render

#: Chapters of the page, each of the tables whose names fit its patterns, and of none of an earlier one's.
CHAPTERS = {
    "Claims": ("diversity", "copyright", "latency"),
    "Beside other methods": ("peers*", "published"),
    "Requests, decided by a policy": (
        "safety*", "gate", "redteam*", "policy_sensitivity", "deliberation", "published_cards",
    ),
    "People": ("stereotypes", "attribute_classifier"),
    "Settings and controls": ("sweep", "copyright_sweep", "cfg_scale", "ablate_*"),
    "What the small models know": ("memorised*",),
    "Further": ("*",),
}  # fmt: skip
#: Pages and tables that are no section of their own: the paper's numbers stand beside ours, and what explains a folder.
APART = ("paper", "README")
#: Marks a page as made here, which may be replaced.
MARK = '<meta name="generator" content="experiments.report">'


def report(results: Path, outputs: Path, into: Path, groups: int = 40, single_file: bool = False) -> Path:
    """Write the page, `into/index.html`, and what it shows; nothing else in that folder is touched.

    Args:
        results: folder of the tables.
        outputs: folder of the runs; it need not exist.
        into: folder of the page; either it holds an earlier page, or nothing, or it does not exist.
        groups: of how many groups of a model the images are shown, evenly over the categories.
        single_file: put the pictures into the page, not beside it.

    Raises:
        FileNotFoundError: there are no tables.
        ValueError: `into` holds something else than an earlier page, `groups` is negative, or an image, a table or a
            page of words is damaged.
    """
    if groups < 0:
        raise ValueError(f"expected a number of groups of at least 0, got {groups}: 0 shows no images")
    page = into / "index.html"
    others = into.exists() and any(entry.name != PICTURES and entry.name[0] != "." for entry in into.iterdir())
    if others and not (page.is_file() and MARK.encode() in page.read_bytes()):
        raise ValueError(f"expected an earlier page, an empty folder or none, got {into}: choose another --into")
    if not any(path.stem not in APART for path in results.glob("*.csv")):
        raise FileNotFoundError(f"expected tables in {results}, got none: make one with {commands('diversity')[0]}")
    pictures = Pictures(inline=single_file)
    sections = _sections(results, outputs, pictures, groups)
    diversity = sections.get("diversity", {})
    best = clearest(diversity) if "frame" in diversity else None
    text = render(
        "report.html",
        chapters=_chapters(sections), mark=Markup(MARK), pages=pages, lines=cell_lines, verdicts=verdicts(sections),
        best=best, sheet=None if best else sheet(diversity.get("models", []), results, pictures),
        single_file=single_file,
    )  # fmt: skip
    with locked(into / ".lock"):
        beside = into / PICTURES
        beside.mkdir(exist_ok=True)
        for name, content in pictures.items():
            if not ((beside / name).is_file() and (beside / name).read_bytes() == content):
                (beside / name).write_bytes(content)
        write_text(page, text)
        for file in beside.iterdir():  # of an earlier page; files of other names stay
            if re.fullmatch(r"[0-9a-f]{16}\.[a-z]+", file.name) and file.name not in pictures:
                file.unlink()
        if single_file and not any(beside.iterdir()):
            beside.rmdir()
    return page


def _chapters(sections: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the sections of each chapter, those that are named in their order, the others by their names."""
    left, chapters = sorted(sections), {}
    for chapter, patterns in CHAPTERS.items():
        names = list(dict.fromkeys(name for pattern in patterns for name in left if fnmatch(name, pattern)))
        if names:
            chapters[chapter] = [sections[name] for name in names]
        left = [name for name in left if name not in names]
    return chapters


def _sections(results: Path, outputs: Path, pictures: Pictures, groups: int) -> dict[str, dict[str, Any]]:
    """Return what the page says of every table, and of what is beside them; nothing of the folder is left out."""
    kinds = {kind: sorted(results.glob(f"*.{kind}")) for kind in ("csv", "md")}
    own = {kind: [file for file in files if not is_elsewhere(file, results)] for kind, files in kinds.items()}
    tables = {path.stem: read_csv(path) for path in own["csv"] if path.stem not in APART}
    words = {path.stem: path for path in own["md"] if path.stem not in APART}
    of_experiments = {name for name, frame in tables.items() if _is_experiment(name, frame)}
    # A table without a page of its own, as that of outcomes, belongs to one with words whose name its own begins with.
    told = of_experiments | words.keys()
    names = {name for name in tables if name in told or not _owner(name, told)}
    names |= {stem for stem in words if not _owner(stem, names)}
    sections = {
        name: _section(name, tables.get(name), name in of_experiments, results, outputs, pictures, groups)
        for name in sorted(names)
    }
    for stem, path in words.items():
        if stem not in of_experiments:  # whose page says what its section does
            owner = stem if stem in names else _owner(stem, names)
            if content := read_page(path):
                sections[owner]["words"].append((stem, content))
    for stem, frame in tables.items():
        if stem not in of_experiments:
            owner = stem if stem in names else _owner(stem, names)
            rows = frame.dropna(axis="columns", how="all").map(spelled)
            if not rows.empty:
                sections[owner]["rows"].append((stem, rows))
    drawn = {f"{name}_{key}" for name, section in sections.items() for key in section["drawn"]}
    drawn |= {f"{name}_grid_{model}" for name, section in sections.items() for model in section["models"]}
    for file in kept(results):
        if file.stem in drawn or is_elsewhere(file, results):
            continue
        if not (owner := file.stem if file.stem in names else _owner(file.stem, names)):
            owner = file.stem.partition("_")[0]
            sections.setdefault(owner, _head(owner, None))
        sections[owner]["figures"].append(pictures.copy(file, f"{file.stem}: a picture beside the table"))
    return {name: section for name, section in sections.items() if _has_content(section)}


def _has_content(section: dict[str, Any]) -> bool:
    """Tell whether a section shows anything but how it would be made."""
    return "frame" in section or any(section[kind] for kind in ("words", "rows", "figures"))


def _owner(stem: str, names: Any) -> str:
    """Return the longest of the names that another begins with, or nothing."""
    return max((name for name in names if stem.startswith(f"{name}_")), key=len, default="")


def _is_experiment(name: str, frame: pd.DataFrame) -> bool:
    return set(frame.columns) >= REQUIRED and bool((frame["experiment"] == name).all()) and not frame.empty


def _head(name: str, frame: pd.DataFrame | None) -> dict[str, Any]:
    """Return what every section has: what it asks, of which models, by which commands; and nothing else yet."""
    configured = PROJECT / "conf" / "experiment" / f"{name}.yaml"
    return {
        "name": name,
        "claim": (OmegaConf.load(configured).get("description") or "") if configured.exists() else "",
        "commands": commands(name) if configured.exists() else [],
        "models": list(frame["model"].unique()) if frame is not None and "model" in frame else [],
        "runs_here": "", "words": [], "rows": [], "figures": [], "drawn": [],
    }  # fmt: skip


def _section(
    name: str,
    frame: pd.DataFrame | None,
    experiment: bool,
    results: Path,
    outputs: Path,
    pictures: Pictures,
    groups: int,
) -> dict[str, Any]:
    """Return what the page says of one table."""
    section = _head(name, frame)
    if frame is not None and set(MEASURED) <= set(frame.columns):
        section["targets"] = target_table(frame, first([f"experiment={name}"]))
    if not experiment:
        return section
    frame = read_table(name, results)
    runs, figures = read_runs(frame, outputs), called_for(frame)
    return section | {
        "frame": frame,
        "runs_here": f"{sum(run['manifest'] is not None for run in runs)} of {len(runs)}",
        "drawn": list(figures),
        "figures": [
            pictures.plate(encode(figure, "svg"), "svg", 96 * figure.get_size_inches(), what) | {"key": key}
            for key, (figure, what) in figures.items()
        ],
        "galleries": [
            gallery(name, model, [run for run in runs if run["model"] == model], results, pictures, groups)
            for model in section["models"]
        ],
        "settings": printed(run["settings"] for run in runs),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("report", usage="python -m experiments report [--help]")
    parser.add_argument("--results", help="folder of the tables (default: outputs/results, else results)")
    parser.add_argument("--outputs", default="outputs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--into", default="outputs/report", help="folder of the page (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=40, help="groups of a model to show (default: %(default)s)")
    parser.add_argument("--single-file", action="store_true", help="pictures within the page, not beside it")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    made = Path(arguments.outputs) / "results"  # what was made here comes before what was published
    results = arguments.results or (made if any(project_path(made).glob("*.csv")) else "results")
    folders = [project_path(path) for path in (results, arguments.outputs, arguments.into)]
    print(report(*folders, groups=arguments.groups, single_file=arguments.single_file))
