"""The sections of a page: one for each table of results, with the pages and figures of its folder."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from experiments import PROJECT
from experiments.figures import figures_for
from experiments.figures.style import encode
from experiments.report.galleries import gallery, read_runs
from experiments.report.markdown import read_page
from experiments.report.pictures import Pictures, result_files
from experiments.tables.columns import REQUIRED, commands, format_setting, printed, read_csv, read_table

#: Chapters of the page and patterns of their sections' names; a section is in the first chapter that it fits.
CHAPTERS = {
    "Claims": ("diversity", "copyright", "latency"),
    "Compared with other methods": ("peers*", "few_steps*", "published"),
    "Requests, decided by a policy": (
        "safety*", "gate", "redteam*", "policy_sensitivity", "deliberation", "published_cards",
    ),
    "People": ("stereotypes", "attribute_classifier"),
    "Settings and controls": ("sweep", "copyright_sweep", "cfg_scale", "ablate_*"),
    "What the small models know": ("memorised*",),
    "Further": ("*",),
}  # fmt: skip
#: Files without a section: the paper's numbers, which stand with ours, and the explanation of the folder.
APART = ("paper", "README")

Section = dict[str, Any]


def read_sections(results: Path, outputs: Path, pictures: Pictures, groups: int) -> dict[str, Section]:
    """Return the sections by name; no table, page or image of the folder is left out, and none is shown twice.

    Args:
        results: folder of the tables.
        outputs: folder of the runs.
        pictures: to which the images are added.
        groups: the largest number of groups of a model whose images are shown.
    """
    tables = {name: read_csv(path) for name, path in result_files(results, "csv").items() if name not in APART}
    texts = {name: path for name, path in result_files(results, "md").items() if name not in APART}
    images = result_files(results, "png", "webp")
    experiments = {name for name, frame in tables.items() if is_experiment(name, frame)}
    names = {_owner(name) for name in (*tables, *texts, *images)}
    sections = {name: new_section(name, tables.get(name)) for name in sorted(names)}
    shown = set()
    for name in sorted(experiments):
        _add_experiment(sections[name], results, outputs, images, pictures, groups)
        shown |= {f"{name}/{figure['name']}" for figure in sections[name]["figures"]}
        shown |= {f"{name}/grid_{model}" for model in sections[name]["models"]}
    for name in texts.keys() - experiments:  # the page of an experiment repeats its table
        if page := read_page(texts[name]):
            sections[_owner(name)]["pages"].append((name, page))
    for name in sorted(tables.keys() - experiments):
        rows = tables[name].dropna(axis="columns", how="all").map(format_setting)
        if not rows.empty:
            sections[_owner(name)]["tables"].append((name, rows))
    for name in images.keys() - shown:
        figure = pictures.copy(images[name], f"{name}: an image that was kept with the table")
        sections[_owner(name)]["figures"].append(figure)
    for section in sections.values():
        section["pages"].sort()
        section["figures"].sort(key=lambda figure: (not figure["name"], figure["alt"] if not figure["name"] else ""))
    kinds = ("pages", "tables", "figures")  # a section without them only says how it would be made
    return {name: one for name, one in sections.items() if "frame" in one or any(one[kind] for kind in kinds)}


def _owner(name: str) -> str:
    """Return the section of a file: the name of its folder, or its own where it lies in none."""
    return name.partition("/")[0]


def is_experiment(name: str, frame: pd.DataFrame) -> bool:
    """Tell whether a table is that of an experiment of its name."""
    return set(frame.columns) >= REQUIRED and bool((frame["experiment"] == name).all()) and not frame.empty


def new_section(name: str, frame: pd.DataFrame | None = None) -> Section:
    """Return a section with its description, models and commands, and nothing else yet."""
    file = PROJECT / "conf" / "experiment" / f"{name}.yaml"
    return {
        "name": name,
        "description": (OmegaConf.load(file).get("description") or "") if file.exists() else "",
        "commands": commands(name) if file.exists() else [],
        "models": list(frame["model"].unique()) if frame is not None and "model" in frame else [],
        "pages": [], "tables": [], "figures": [],
    }  # fmt: skip


def _add_experiment(
    section: Section, results: Path, outputs: Path, images: Mapping[str, Path], pictures: Pictures, groups: int
) -> None:
    """Add the table, the figures and the images of an experiment's runs to its section."""
    name = section["name"]
    frame = section["frame"] = read_table(name, results)
    runs = read_runs(frame, outputs)
    section["runs_here"] = f"{sum(run['manifest'] is not None for run in runs)} of {len(runs)}"
    section["settings"] = printed(run["settings"] for run in runs)
    for key, (figure, alt) in figures_for(frame).items():
        size = 96 * figure.get_size_inches()
        section["figures"].append(pictures.figure(encode(figure, "svg"), "svg", size, alt, key))
    section["galleries"] = []
    for model in section["models"]:
        of_model = [run for run in runs if run["model"] == model]
        sheet = images.get(f"{name}/grid_{model}")
        section["galleries"].append(gallery(name, model, of_model, sheet, pictures, groups))


def chapters(sections: Mapping[str, Section]) -> dict[str, list[Section]]:
    """Return the sections of each chapter, in the order of its patterns and then of their names."""
    left, ordered = sorted(sections), {}
    for chapter, patterns in CHAPTERS.items():
        names = list(dict.fromkeys(name for pattern in patterns for name in left if fnmatch(name, pattern)))
        if names:
            ordered[chapter] = [sections[name] for name in names]
        left = [name for name in left if name not in names]
    return ordered


def cell_lines(cell: Any) -> list[str]:
    """Split `value; difference [interval]`, `value [interval]` and `words (margin)` into two lines."""
    parts = re.fullmatch(r"([^;]+); (.+)|(-?[\d.]+) (\[.+\])|([a-z ]+) (\(margin .+\))", str(cell))
    return [part for part in parts.groups() if part] if parts else [str(cell)]
