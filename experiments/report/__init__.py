"""Make one page of all tables, figures and images, which a browser reads without a server or a network.

    python -m experiments report [--results FOLDER] [--outputs FOLDER] [--into FOLDER] [--groups 40] [--single-file]

The page shows the tables of `--results` (default: outputs/results if it has tables, else the published results/) and
the images of their runs that are on this machine, at most `--groups` groups a model. Reduced copies of the images lie
in the page's folder (default: outputs/report), which can be moved or sent. With `--single-file` they are in the page.
Equal inputs give equal bytes.
"""

import argparse
import logging
import re
from pathlib import Path

from markupsafe import Markup

from eval.files import write_text
from experiments import PROJECT, project_path
from experiments.report.headlines import clearest, headlines
from experiments.report.pictures import PICTURES, Pictures, result_files
from experiments.report.sections import APART, cell_lines, chapters, read_sections
from experiments.runs.locks import locked
from experiments.tables import pages
from experiments.tables.columns import commands
from experiments.tables.templates import render

#: Marks a page as made here, so that it may be replaced.
MARK = '<meta name="generator" content="experiments.report">'


def report(results: Path, outputs: Path, into: Path, groups: int = 40, single_file: bool = False) -> Path:
    """Write the page, `into/index.html`, and its images; nothing else in that folder is touched.

    Args:
        results: folder of the tables.
        outputs: folder of the runs; it need not exist.
        into: folder of the page: new, empty, or with an earlier page.
        groups: of how many groups of a model the images are shown, evenly over the categories.
        single_file: put the images into the page, not beside it.

    Raises:
        FileNotFoundError: there are no tables.
        ValueError: `into` holds something else than an earlier page, `groups` is negative, or an image, a table or a
            Markdown page is damaged.
    """
    if groups < 0:
        raise ValueError(f"expected a number of groups of at least 0, got {groups}: 0 shows no images")
    page = into / "index.html"
    is_used = into.exists() and any(entry.name != PICTURES and entry.name[0] != "." for entry in into.iterdir())
    if is_used and not (page.is_file() and MARK.encode() in page.read_bytes()):
        raise ValueError(f"expected an earlier page, an empty folder or none, got {into}: choose another --into")
    if not result_files(results, "csv").keys() - set(APART):
        raise FileNotFoundError(f"expected tables in {results}, got none: make one with {commands('diversity')[0]}")
    pictures = Pictures(inline=single_file)
    sections = read_sections(results, outputs, pictures, groups)
    diversity = sections.get("diversity", {})
    best = clearest(diversity) if "frame" in diversity else None
    text = render(
        "experiments/report/report.html",
        best=best,
        sheet=None if best else _sheet(diversity.get("models", []), results, pictures),
        headlines=headlines(sections),
        chapters=chapters(sections),
        lines=cell_lines,
        mark=Markup(MARK),
        pages=pages,
        single_file=single_file,
    )
    _write(page, text, pictures)
    return page


def _sheet(models: list[str], results: Path, pictures: Pictures) -> dict[str, object] | None:
    """Return an image grid of diversity, of the table's models or else as it is published."""
    grids = result_files(PROJECT / "results", "webp") | result_files(results, "png", "webp")
    for model in (*models, "mini-sdxl"):
        if file := grids.get(f"diversity/grid_{model}"):
            origin = "kept with the table" if results in file.parents else "published with this project"
            return pictures.copy(file, f"{model}: the same seeds without and with NegToMe, as {origin}")
    return None


def _write(page: Path, text: str, pictures: Pictures) -> None:
    """Write a page after its images, then delete those of an earlier page: a killed command leaves a complete page."""
    with locked(page.parent / ".lock"):
        folder = page.parent / PICTURES
        folder.mkdir(exist_ok=True)
        for name, content in pictures.items():
            if not ((folder / name).is_file() and (folder / name).read_bytes() == content):
                (folder / name).write_bytes(content)
        write_text(page, text)
        for file in folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{16}\.[a-z]+", file.name) and file.name not in pictures:
                file.unlink()
        if pictures.inline and not any(folder.iterdir()):
            folder.rmdir()


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("report", usage="python -m experiments report [--help]")
    parser.add_argument("--results", help="folder of the tables (default: outputs/results if it has any, else results)")
    parser.add_argument("--outputs", default="outputs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--into", default="outputs/report", help="folder of the page (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=40, help="groups of a model to show (default: %(default)s)")
    parser.add_argument("--single-file", action="store_true", help="put the images into the page, not beside it")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    local = Path(arguments.outputs) / "results"
    results = arguments.results or (local if result_files(project_path(local), "csv") else "results")
    folders = [project_path(path) for path in (results, arguments.outputs, arguments.into)]
    print(report(*folders, groups=arguments.groups, single_file=arguments.single_file))
