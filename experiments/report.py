"""Act 5: all tables, figures and images become one page, read in a browser without a server or a network.

    python -m experiments.report [--results FOLDER] [--outputs FOLDER] [--into FOLDER] [--groups 40]

It shows the tables of `--results` (default: those made here, outputs/results; where there are none, the published
ones, results), and of each table's runs the images that are on this machine, at most `--groups` groups a model.
Reduced copies of them lie beside the page, so that its folder (default: outputs/report) can be moved or sent as it
is. Equal inputs give equal bytes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import glob
import hashlib
import itertools
import logging
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from hydra.errors import HydraException
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from eval.files import content_hash, sweep, write_text
from eval.images import ManifestRow, group_rows, load_picture, read_manifest
from experiments import PROJECT, catalogue, pages, project_path
from experiments.configs import first
from experiments.figures import called_for
from experiments.figures.style import encode, title
from experiments.locks import locked
from experiments.methods.assets import read_assets
from experiments.runs import Run
from experiments.tables import CALL, REQUIRED, check_names, commands, read_csv, spelled, whole
from experiments.timing.report import case_table, measured_cases, target_table
from experiments.timing.rows import MEASURED

log = logging.getLogger(__name__)

#: Tables in the order of the page: the claims, all others by their names, what they rest on.
FIRST, LAST = ("diversity", "copyright", "latency"), ("sweep", "memorised")
#: Of a reduced image, in pixels; smaller ones keep their size.
SIDE = 256
#: Shown of every model where no script chooses.
STATIC_GROUPS = 3
#: Marks a page as made here, which may be replaced.
MARK = '<meta name="generator" content="experiments.report">'
#: What the folder of a page's pictures is called while its content, and so its name, is not known.
PICTURES = "pictures-of-a-page-that-is-being-made"
#: What it is called then.
NAMED = re.compile("pictures-[0-9a-f]{12}")
#: Held while a page is put in the place of another; in the page's folder.
LOCK = ".lock"


def report(results: Path, outputs: Path, into: Path, groups: int = 40) -> Path:
    """Write the page and what it shows into a folder; nothing else in it is touched.

    All pictures lie in one folder that is named after their content, so that a page of before stays whole until the new
    one takes its place, by one rename, and whoever is killed or comes second leaves a whole page.

    Args:
        results: folder of the tables.
        outputs: folder of the runs.
        into: the page's folder.
        groups: of how many groups of a model the images are shown, evenly over the categories.

    Returns:
        The page, `into/index.html`.

    Raises:
        FileNotFoundError: there are no tables.
        ValueError: `into` holds something else than an earlier page, `groups` is negative, or an image or a table is
            damaged.
    """
    if groups < 0:
        raise ValueError(f"expected a number of groups of at least 0, got {groups}: 0 shows no images")
    page = into / "index.html"
    others = into.exists() and any(entry.name != LOCK and not NAMED.fullmatch(entry.name) for entry in into.iterdir())
    if others and not (page.is_file() and MARK.encode() in page.read_bytes()):
        raise ValueError(f"expected an earlier page, an empty folder or none, got {into}: choose another --into")
    names = sorted((path.stem for path in results.glob("*.csv") if path.stem != "paper"), key=_place)
    if not names:
        raise FileNotFoundError(f"expected tables in {results}, got none: make one with {commands('diversity')[0]}")
    sweep(into.parent, f".{glob.escape(into.name)}.*")
    folder = into.with_name(f".{into.name}.{uuid.uuid4().hex}")
    try:
        (folder / "figures").mkdir(parents=True)
        sections = [_section(name, results, outputs, folder, groups) for name in names]
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        text = environment.get_template("report.html").render(sections=sections, mark=Markup(MARK), pages=pages)
        _put(folder, text, page)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return page


def _put(pictures: Path, text: str, page: Path) -> None:
    """Put a page and its pictures in the place of the one before."""
    name = f"pictures-{_digest(pictures)}"
    with locked(page.parent / LOCK):
        there = page.parent / name
        if there.exists() and not name.endswith(_digest(there)):  # killed while it was removed, or changed by hand
            shutil.rmtree(there)
        if not there.exists():
            pictures.rename(there)
        write_text(page, text.replace(PICTURES, name))
        for entry in page.parent.iterdir():
            if NAMED.fullmatch(entry.name) and entry.name != name and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)


def _digest(folder: Path) -> str:
    """Return 12 hexadecimal digits of what a folder holds."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n{content_hash(file)}\n".encode())
    return digest.hexdigest()[:12]


def _place(name: str) -> tuple[int, str]:
    if name in FIRST:
        return FIRST.index(name) - len(FIRST), name
    return (LAST.index(name) + 1 if name in LAST else 0), name


def _section(name: str, results: Path, outputs: Path, folder: Path, groups: int) -> dict[str, Any]:
    """Return what the page says of one table, its files written."""
    path = results / f"{name}.csv"
    frame = read_csv(path)
    configured = PROJECT / "conf" / "experiment" / f"{name}.yaml"
    section = {
        "name": name,
        "claim": (OmegaConf.load(configured).get("description") or "") if configured.exists() else "",
        "commands": commands(name) if configured.exists() else [],
        "models": list(frame["model"].unique()) if "model" in frame else [],
    }
    if not set(frame.columns) >= REQUIRED or not (frame["experiment"] == name).all() or frame.empty:
        return section | _foreign(name, frame, results, folder)
    check_names(frame, path)
    frame = whole(frame)
    runs = _runs(frame, outputs)
    drawn = []
    for figure_name, (figure, what) in called_for(frame).items():
        file = f"figures/{name}_{figure_name}.svg"
        (folder / file).write_bytes(encode(figure, "svg"))
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        drawn.append({"file": quote(f"{PICTURES}/{file}"), "alt": what, "width": width, "height": height})
    settings = pd.DataFrame([run["settings"] for run in runs]).replace("", None).dropna(axis="columns", how="all")
    return section | {
        "runs_here": f"{sum(run['manifest'] is not None for run in runs)} of {len(runs)}",
        "findings": [finding.removeprefix("- ").split(": ", 1) for finding in pages.findings(frame)],
        "main": _table(pages.main_table(frame)),
        "scored_by": pages.scored_by(frame),
        "paper": _table(pages.paper_table(name)),
        "others": _table(pages.other_table(frame)),
        "figures": drawn,
        "galleries": [
            _gallery(name, model, [run for run in runs if run["model"] == model], results, folder, groups)
            for model in section["models"]
        ],
        "settings": _table(settings.fillna("")),
        "foreign": None,
    }


def _foreign(name: str, frame: pd.DataFrame, results: Path, folder: Path) -> dict[str, Any]:
    """Return the rest of a section of a table with columns of its own: what it holds, and the pictures beside it."""
    if set(MEASURED) <= set(frame.columns):
        cfg = first([f"experiment={name}"])
        found = [("Targets", target_table(frame, cfg))]
        for rows in measured_cases(frame):
            case = rows.iloc[0]
            head = f"{case['model']}, {case['side']:g} pixels, {case['batch']:g} images, {case['device']}"
            found.append((head, case_table(rows, dict(cfg.latency.titles))))
    else:
        found = [("All rows", frame.dropna(axis="columns", how="all").map(spelled))]
    files = sorted(file for file in results.glob(f"{name}*.png") if file.stem == name or file.stem[len(name)] == "_")
    files = [file for file in files if not _is_elsewhere(file, results)]
    return {
        "runs_here": "",
        "figures": [_copied(file, folder, f"{file.stem}: a picture beside the table") for file in files],
        "foreign": [(head, _table(table)) for head, table in found],
    }


def _copied(file: Path, folder: Path, what: str) -> dict[str, Any]:
    """Copy a picture beside the page and return it as the template takes it."""
    shutil.copyfile(file, folder / "figures" / file.name)
    width, height = load_picture(file).size
    return {"file": quote(f"{PICTURES}/figures/{file.name}"), "alt": what, "width": width, "height": height}


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    """Return a table as the template takes it, a cell as its lines."""
    rows = [[_lines(str(cell)) for cell in row] for row in frame.itertuples(index=False)]
    return {"columns": [str(column) for column in frame.columns], "rows": rows}


def _lines(cell: str) -> list[str]:
    """Return `value; difference [interval]`, `value [interval]` and `words (margin)` as two lines, all else as one."""
    parts = re.fullmatch(r"([^;]+); (.+)|(-?[\d.]+) (\[.+\])|([a-z ]+) (\(margin .+\))", cell)
    return [part for part in parts.groups() if part] if parts else [cell]


def _runs(frame: pd.DataFrame, outputs: Path) -> list[dict[str, Any]]:
    """Return a table's runs, each with its settings in words and, where its folder is here, its images' rows."""
    labels, found = pages.run_labels(frame), []
    for (run_id, model), rows in frame.groupby(["run_id", "model"], sort=False):
        common = rows.iloc[0]
        name = title(labels[run_id], common["method"])
        place = Path(common["experiment"]) / model / common["method"] / run_id
        run, manifest, state, made = Run(outputs / place), None, "not on this machine", {}
        if run.complete:
            try:
                manifest, state, made = _images(run), place.as_posix(), run.identity["machine"] | run.environment
            except (OSError, ValueError, KeyError) as error:
                log.warning("The images of %s are left out: %s", run.folder, error)
                state = "cannot be read"
        settings = {"model": model, "method": name, "run": run_id}
        settings |= {one.heading: one.text(common) for one in dict.fromkeys((*CALL, *catalogue.settings()))}
        settings |= {column: spelled(common[column]) for column in ("device", "commit")}
        settings |= {package: made.get(package, "") for package in ("python", "torch", "diffusers", "transformers")}
        settings["folder of its images"] = state
        found.append({"model": model, "title": name, "id": run_id, "folder": run.folder, "manifest": manifest,
                      "settings": settings})  # fmt: skip
    return found


def _images(run: Run) -> dict[str, list[ManifestRow]]:
    """Return the rows of a run's images by group.

    Raises:
        OSError, ValueError: images are gone, or not the run's own; or the manifest is damaged.
    """
    manifest = group_rows(read_manifest(run.folder))
    paths = [run.folder / row.path for rows in manifest.values() for row in rows]
    if gone := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(gone)} images are gone, the first {gone[0]}")
    if any(_is_elsewhere(path, run.folder) for path in paths):
        raise ValueError("expected images of its own, got links")
    return manifest


def _is_elsewhere(file: Path, folder: Path) -> bool:
    """Tell whether a file within a folder is a link, or in a linked folder, and so may be anybody's; then log it."""
    linked = file.resolve() != folder.resolve() / file.relative_to(folder)
    if linked:
        log.warning("%s is left out: it is a link, and what it links to may not be meant for others", file)
    return linked


def _gallery(
    name: str, model: str, runs: list[dict[str, Any]], results: Path, folder: Path, limit: int
) -> dict[str, Any]:
    """Return what is needed to choose among a model's images, and write their reduced copies."""
    absent = [run["title"] for run in runs if run["manifest"] is None]
    here = [run for run in runs if run["manifest"] is not None]
    everything = {group: rows for run in reversed(here) for group, rows in run["manifest"].items()}
    chosen = _spread(everything, limit)
    pushed = any(row.references for run in here for rows in run["manifest"].values() for row in rows)
    assets = _asset_files(model) if pushed else {}
    base = Path("images") / name / model
    groups = []
    for number, group in enumerate(chosen):
        row = everything[group][0]
        asset = assets.get(row.category)
        if asset is not None:
            _reduce(asset, folder / base / "assets" / f"{number:03d}.webp")
        groups.append(
            {"prompt": row.prompt, "category": row.category, "seed": row.group_seed, "size": len(everything[group]),
             "asset": quote(f"{PICTURES}/{base.as_posix()}/assets/{number:03d}.webp") if asset is not None else None}
        )  # fmt: skip
    shown = []
    for run in here:
        away = {}
        for number, group in enumerate(tqdm(chosen, desc=f"{name} {model} {run['title']}", disable=None, leave=False)):
            rows = run["manifest"].get(group, [])
            for row in rows:
                _reduce(run["folder"] / row.path, folder / base / run["id"] / f"{number:03d}-{row.index}.webp")
            away[number] = _away(rows)
        shown.append(
            {"title": run["title"], "id": run["id"], "base": quote(f"{PICTURES}/{base.as_posix()}/{run['id']}/"),
             "groups": [number for number, group in enumerate(chosen) if group in run["manifest"]],
             "away": {number: text for number, text in away.items() if text}}
        )  # fmt: skip
    sheet = results / f"{name}_grid_{model}.png"
    picture = None
    if not here and sheet.exists() and not _is_elsewhere(sheet, results):
        what = f"a choice of the images of {model}, one row a prompt, one block of columns a method"
        picture = _copied(sheet, folder, what)
    return {
        "id": f"{name}-{model}",
        "model": model,
        "absent": absent,
        "n_runs": len(runs),
        "n_groups": len(everything),
        "sheet": picture,
        "data": {"groups": groups, "runs": shown},
        "static": list(enumerate(groups))[:STATIC_GROUPS],
    }


def _away(rows: Iterable[ManifestRow]) -> str:
    """Say from which pictures a group was pushed; empty where the method takes none."""
    row = next(iter(rows), None)
    if row is None or row.references is None:
        return ""
    if not row.references:
        return "found no asset to stay away from"
    return "away from " + ", ".join(f"{label} ({score:.2f})" for label, score in row.references.items())


def _spread(groups: dict[str, list[ManifestRow]], limit: int) -> list[str]:
    """Return at most `limit` groups: the first of every category, then the second of every one, and so on."""
    by_category: dict[str, list[str]] = {}
    for group in sorted(groups):
        by_category.setdefault(groups[group][0].category, []).append(group)
    turns = itertools.zip_longest(*by_category.values())
    chosen = [group for turn in turns for group in turn if group is not None][:limit]
    return sorted(chosen, key=lambda group: (groups[group][0].category, group))


def _asset_files(model: str) -> dict[str, Path]:
    """Return one picture of every protected asset that is configured for a model, as `experiments.plot` shows them."""
    try:
        assets = read_assets(first([f"model={model}"]).model.copyright.guidance)
    except (HydraException, OSError, ValueError):
        return {}  # of a model or a folder that is not here
    return {asset.name: asset.file for asset in reversed(assets)}


def _reduce(image: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    reduced = load_picture(image)
    reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    reduced.save(file, quality=90)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("report", usage="python -m experiments report [--help]")
    parser.add_argument("--results", help="folder of the tables (default: outputs/results, else results)")
    parser.add_argument("--outputs", default="outputs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--into", default="outputs/report", help="folder of the page (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=40, help="groups of a model to show (default: %(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    made = Path(arguments.outputs) / "results"  # what was made here comes before what was published
    results = arguments.results or (made if any(project_path(made).glob("*.csv")) else "results")
    folders = [project_path(path) for path in (results, arguments.outputs, arguments.into)]
    print(report(*folders, groups=arguments.groups))
