"""Act 5: all tables, figures and images become one page, read in a browser without a server or a network.

    python -m experiments.report [--results FOLDER] [--outputs FOLDER] [--into FOLDER] [--groups 40]

It shows the tables of `--results` (default: those made here, outputs/results; where there are none, the published
ones, results), and of each table's runs the images that are on this machine, at most `--groups` groups a model.
Reduced copies of them lie beside the page, so that its folder (default: outputs/report) can be moved or sent as it
is. Equal inputs give equal bytes.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import hashlib
import io
import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.errors import HydraException
from markupsafe import Markup
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from eval.files import write_text
from eval.images import ManifestRow, WithheldRow, group_rows, load_picture, read_manifest, read_withheld
from experiments import PROJECT, catalogue, pages, project_path
from experiments.configs import first
from experiments.figures import called_for
from experiments.figures.style import encode, title
from experiments.locks import locked
from experiments.methods.assets import read_assets
from experiments.runs import RUNS, Run
from experiments.tables import CALL, REQUIRED, commands, printed, read_csv, read_table, spelled
from experiments.templates import render
from experiments.timing.report import case_tables, target_table
from experiments.timing.rows import MEASURED

log = logging.getLogger(__name__)

#: Tables in the order of the page: the claims, all others ("") by their names, what they rest on.
ORDER = ("diversity", "copyright", "latency", "", "sweep", "memorised")
#: Of a reduced image, in pixels; smaller ones keep their size.
SIDE = 256
#: Marks a page as made here, which may be replaced.
MARK = '<meta name="generator" content="experiments.report">'
#: Folder of a page's pictures, beside it, each named after its content.
PICTURES = "pictures"


class Pictures(dict[str, bytes]):
    """What lies beside a page, by names that are made of the contents.

    None takes another's place: a page of before stays whole until the new one replaces it, and whoever is killed or
    comes second leaves a whole page.
    """

    def put(self, content: bytes, kind: str) -> str:
        """Take a picture of a kind, such as png; return its address on the page."""
        name = f"{hashlib.sha256(content).hexdigest()[:16]}.{kind}"
        self[name] = content
        return f"{PICTURES}/{name}"

    def plate(self, content: bytes, kind: str, size: tuple[float, float], what: str) -> dict[str, Any]:
        """Take a picture that stands by itself, of so many pixels; return it as the template wants it."""
        width, height = map(round, size)
        return {"file": self.put(content, kind), "alt": what, "width": width, "height": height}

    def copy(self, file: Path, what: str) -> dict[str, Any]:
        return self.plate(file.read_bytes(), file.suffix[1:], load_picture(file).size, what)


def report(results: Path, outputs: Path, into: Path, groups: int = 40) -> Path:
    """Write the page, `into/index.html`, and what it shows; nothing else in that folder is touched.

    Args:
        results: folder of the tables.
        outputs: folder of the runs; it need not exist.
        into: folder of the page; either it holds an earlier page, or nothing, or it does not exist.
        groups: of how many groups of a model the images are shown, evenly over the categories.

    Raises:
        FileNotFoundError: there are no tables.
        ValueError: `into` holds something else than an earlier page, `groups` is negative, or an image or a table is
            damaged.
    """
    if groups < 0:
        raise ValueError(f"expected a number of groups of at least 0, got {groups}: 0 shows no images")
    page = into / "index.html"
    others = into.exists() and any(entry.name != PICTURES and entry.name[0] != "." for entry in into.iterdir())
    if others and not (page.is_file() and MARK.encode() in page.read_bytes()):
        raise ValueError(f"expected an earlier page, an empty folder or none, got {into}: choose another --into")
    names = sorted(path.stem for path in results.glob("*.csv") if path.stem != "paper")
    names.sort(key=lambda name: ORDER.index(name if name in ORDER else ""))
    if not names:
        raise FileNotFoundError(f"expected tables in {results}, got none: make one with {commands('diversity')[0]}")
    pictures = Pictures()
    sections = [_section(name, results, outputs, pictures, groups) for name in names]
    text = render("report.html", sections=sections, mark=Markup(MARK), pages=pages, lines=_lines)
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
    return page


def _section(name: str, results: Path, outputs: Path, pictures: Pictures, groups: int) -> dict[str, Any]:
    """Return what the page says of one table."""
    frame = read_csv(results / f"{name}.csv")
    configured = PROJECT / "conf" / "experiment" / f"{name}.yaml"
    section = {
        "name": name,
        "claim": (OmegaConf.load(configured).get("description") or "") if configured.exists() else "",
        "commands": commands(name) if configured.exists() else [],
        "models": list(frame["model"].unique()) if "model" in frame else [],
    }
    if not set(frame.columns) >= REQUIRED or not (frame["experiment"] == name).all() or frame.empty:
        return section | _foreign(name, frame, results, pictures)
    frame = read_table(name, results)
    runs = _runs(frame, outputs)
    return section | {
        "frame": frame,
        "runs_here": f"{sum(run['manifest'] is not None for run in runs)} of {len(runs)}",
        "figures": [
            pictures.plate(encode(figure, "svg"), "svg", 96 * figure.get_size_inches(), what)
            for figure, what in called_for(frame).values()
        ],
        "galleries": [
            _gallery(name, model, [run for run in runs if run["model"] == model], results, pictures, groups)
            for model in section["models"]
        ],
        "settings": printed(run["settings"] for run in runs),
        "foreign": None,
    }


def _foreign(name: str, frame: pd.DataFrame, results: Path, pictures: Pictures) -> dict[str, Any]:
    """Return the rest of a section of a table with columns of its own: what it holds, and the pictures beside it."""
    if set(MEASURED) <= set(frame.columns):
        cfg = first([f"experiment={name}"])
        found = [("Targets", target_table(frame, cfg))]
        for case, table in case_tables(frame, cfg.latency.titles):
            head = f"{case['model']}, {case['side']:g} pixels, {case['batch']:g} images, {case['device']}"
            found.append((head, table))
    else:
        found = [("All rows", frame.dropna(axis="columns", how="all").map(spelled))]
    files = sorted(
        file for kind in ("png", "webp") for file in results.glob(f"{name}*.{kind}")
        if file.stem == name or file.stem[len(name)] == "_"
    )  # fmt: skip
    files = [file for file in files if not _is_elsewhere(file, results)]
    return {
        "runs_here": "",
        "figures": [pictures.copy(file, f"{file.stem}: a picture beside the table") for file in files],
        "foreign": found,
    }


def _lines(cell: Any) -> list[str]:
    """Return `value; difference [interval]`, `value [interval]` and `words (margin)` as two lines, all else as one."""
    parts = re.fullmatch(r"([^;]+); (.+)|(-?[\d.]+) (\[.+\])|([a-z ]+) (\(margin .+\))", str(cell))
    return [part for part in parts.groups() if part] if parts else [str(cell)]


def _runs(frame: pd.DataFrame, outputs: Path) -> list[dict[str, Any]]:
    """Return a table's runs, each with its settings in words and, where its folder is here, its groups' rows."""
    labels, found = pages.run_labels(frame), []
    for (run_id, model), rows in frame.groupby(["run_id", "model"], sort=False):
        common = rows.iloc[0]
        name = title(labels[run_id], common["method"])
        run, manifest, state, made = Run(outputs / RUNS / run_id), None, "not on this machine", {}
        if run.complete:
            try:
                manifest, state, made = _images(run), f"{RUNS}/{run_id}", run.identity["machine"] | run.environment
            except (OSError, ValueError, KeyError) as error:
                log.warning("The images of %s are left out: %s", run.folder, error)
                state = "cannot be read"
        settings = {"model": model, "method": name, "run": run_id}
        settings |= {one.heading: one.text(common) for one in dict.fromkeys((*CALL, *catalogue.settings()))}
        settings |= {column: spelled(common[column]) for column in ("device", "commit")}
        settings |= {package: made.get(package, "") for package in ("python", "torch", "diffusers", "transformers")}
        settings["folder of its images"] = state
        found.append({"model": model, "title": name, "folder": run.folder, "manifest": manifest, "settings": settings})
    return found


def _images(run: Run) -> dict[str, list[ManifestRow] | list[WithheldRow]]:
    """Return the rows of a run's images by group; of one that is withheld, the row that says why.

    Raises:
        OSError, ValueError: images are gone, or not the run's own; or the manifest is damaged.
    """
    manifest = group_rows(read_manifest(run.folder))
    paths = [run.folder / row.path for rows in manifest.values() for row in rows]
    if gone := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(gone)} images are gone, the first {gone[0]}")
    if any(_is_elsewhere(path, run.folder) for path in paths):
        raise ValueError("expected images of its own, got links")
    return manifest | {row.group_id: [row] for row in read_withheld(run.folder)}


def _is_elsewhere(file: Path, folder: Path) -> bool:
    """Tell whether a file within a folder is a link, or in a linked folder, and so may be anybody's; then log it."""
    linked = file.resolve() != folder.resolve() / file.relative_to(folder)
    if linked:
        log.warning("%s is left out: it is a link, and what it links to may not be meant for others", file)
    return linked


def _gallery(
    name: str, model: str, runs: list[dict[str, Any]], results: Path, pictures: Pictures, limit: int
) -> dict[str, Any]:
    """Return what is needed to choose among a model's images."""
    here = [run for run in runs if run["manifest"] is not None]
    everything = {group: rows for run in reversed(here) for group, rows in run["manifest"].items()}
    chosen = _spread(everything, limit)
    pushed = any(_shown(rows) and rows[0].references for run in here for rows in run["manifest"].values())
    assets = _asset_files(model) if pushed else {}
    groups = []
    for group in tqdm(chosen, desc=f"{name} {model}", disable=None, leave=False):
        row, shown = everything[group][0], []
        for run in here:
            found = run["manifest"].get(group, [])
            rows = _shown(found)
            withheld = found[0] if found and not rows else None
            images = [pictures.put(_reduced(run["folder"] / row.path), "webp") for row in rows]
            references = rows[0].references if rows else None
            shown.append({"title": run["title"], "images": images, "references": references, "withheld": withheld})
        asset = pictures.put(_reduced(assets[row.category]), "webp") if row.category in assets else None
        groups.append({"row": row, "asset": asset, "runs": shown})
    # Sheets that were published earlier are PNGs.
    sheets = (sheet for kind in ("webp", "png") if (sheet := results / f"{name}_grid_{model}.{kind}").exists())
    sheet, picture = next(sheets, None), None
    if not here and sheet and not _is_elsewhere(sheet, results):
        what = f"a choice of the images of {model}, one row a prompt, one block of columns a method"
        picture = pictures.copy(sheet, what)
    return {"model": model, "runs": runs, "n_groups": len(everything), "sheet": picture, "groups": groups}


def _shown(rows: list[Any]) -> list[ManifestRow]:
    """Return the images of a group's rows."""
    return [row for row in rows if isinstance(row, ManifestRow)]


def _spread(groups: dict[str, list[Any]], limit: int) -> list[str]:
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


def _reduced(image: Path) -> bytes:
    """Return a copy of an image, of at most `SIDE` pixels a side."""
    file, reduced = io.BytesIO(), load_picture(image)
    reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    reduced.save(file, format="webp", quality=90)
    return file.getvalue()


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
