"""The images of a table's runs, group by group: what is on this machine of them, with the scores of each group."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.errors import HydraException
from tqdm import tqdm

from eval.files import read_document
from eval.images import (
    METRICS,
    ManifestRow,
    WithheldRow,
    group_rows,
    load_picture,
    read_manifest,
    read_withheld,
    scores_path,
)
from experiments.figures.style import title
from experiments.methods.assets import read_assets
from experiments.plan import first
from experiments.report.pictures import Pictures, is_elsewhere, kept, reduced
from experiments.runs import catalogue
from experiments.runs.store import RUNS, Run
from experiments.tables import pages
from experiments.tables.columns import CALL, ROLES, spelled, words

log = logging.getLogger(__name__)

#: A number of a table has six digits, that of a document all of them.
ROUNDING = 1e-4


def read_runs(frame: pd.DataFrame, outputs: Path) -> list[dict[str, Any]]:
    """Return a table's runs, each with its settings in words and, where its folder is here, its groups and scores."""
    labels, found = pages.run_labels(frame), []
    calls = [column for setting in CALL for column in setting.columns]
    plain = frame[frame["method"] == "none"].drop_duplicates("run_id")
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
        # What differs from a run by the method alone: the one without, called alike.
        same = plain[calls].map(spelled).eq(common[calls].map(spelled)).all(axis=1)
        bases = plain.loc[same & (plain["model"] == model), "run_id"].tolist()
        found.append(
            {
                "id": run_id, "base": bases[0] if bases and common["method"] != "none" else None,
                "model": model, "method": common["method"], "title": name, "folder": run.folder, "manifest": manifest,
                "scores": {} if manifest is None else _scores(run, rows), "settings": settings,
            }
        )  # fmt: skip
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
    if any(is_elsewhere(path, run.folder) for path in paths):
        raise ValueError("expected images of its own, got links")
    return manifest | {row.group_id: [row] for row in read_withheld(run.folder)}


def _scores(run: Run, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the values of a run's groups, by primary metric: those that the table's number is the mean of."""
    found = {}
    for _, row in rows[rows["primary"].isin(ROLES) & rows["value"].notna()].iterrows():
        path = scores_path(run.folder / METRICS, row["metric"], row["encoder"])
        if not path.is_file() or is_elsewhere(path, run.folder):
            continue
        try:
            document = read_document(path)
        except ValueError as error:
            log.warning("The scores of %s are left out: %s", run.folder, error)
            continue
        if document["aggregate"] != "mean" or not all("value" in group for group in document["groups"]):
            continue  # of categories, or of the whole set
        if not np.isclose(document["value"], row["value"], rtol=ROUNDING):
            log.warning("%s is left out: the table has %g, and it %g", path, row["value"], document["value"])
            continue
        found[row["metric"]] = {group["group"]: group["value"] for group in document["groups"]}
    return found


def gallery(
    name: str, model: str, runs: list[dict[str, Any]], results: Path, pictures: Pictures, limit: int
) -> dict[str, Any]:
    """Return what is needed to choose among a model's images."""
    here = [run for run in runs if run["manifest"] is not None]
    everything = {group: rows for run in reversed(here) for group, rows in run["manifest"].items()}
    # A group keeps its number, and so its address, however many others are shown.
    numbers = {group: number for number, group in enumerate(spread(everything, len(everything)), 1)}
    pushed = any(_shown(rows) and rows[0].references for run in here for rows in run["manifest"].values())
    assets = _asset_files(model) if pushed else {}
    groups = []
    for group in tqdm(spread(everything, limit), desc=f"{name} {model}", disable=None, leave=False):
        row = everything[group][0]
        asset = None
        if row.category in assets:
            asset = pictures.put(reduced(load_picture(assets[row.category])), "webp")
        shown = [_strip(run, group, here, pictures) for run in here]
        address = f"{name}/{model}/{numbers[group]}"
        groups.append({"address": address, "row": row, "asset": asset, "runs": shown})
    picture = None
    for sheet in kept(results, f"{name}_grid_{model}"):
        if not here and not is_elsewhere(sheet, results):
            what = f"a choice of the images of {model}, one row a prompt, one block of columns a method"
            picture = pictures.copy(sheet, what)
    return {
        "model": model, "runs": runs, "n_groups": len(everything), "sheet": picture, "groups": groups,
        "has_images": bool(picture or groups),
        "metrics": list(dict.fromkeys(metric for run in here if run["base"] for metric in run["scores"])),
        "single": max((len(run["images"]) for group in groups for run in group["runs"]), default=0) == 1,
    }  # fmt: skip


def _strip(run: dict[str, Any], group: str, here: list[dict[str, Any]], pictures: Pictures) -> dict[str, Any]:
    """Return what a run has of a group: its images or why there are none, and its scores beside those without."""
    found = run["manifest"].get(group, [])
    rows = _shown(found)
    base = next((number for number, other in enumerate(here) if other["id"] == run["base"]), None)
    scores, changes = [], {}
    for metric, values in run["scores"].items():
        if (value := values.get(group)) is None:
            continue
        before = None if base is None else here[base]["scores"].get(metric, {}).get(group)
        text = f"{value:.3g}"
        if before is not None:
            changes[metric] = value - before
            text += f" ({value - before:+.2g})"
        scores.append({"label": words(metric), "text": text})
    return {
        "title": run["title"], "method": run["method"], "base": base,
        "images": [pictures.tile(run["folder"] / row.path) for row in rows],
        "references": rows[0].references if rows else None,
        "withheld": found[0] if found and not rows else None,
        "scores": scores, "changes": changes,
    }  # fmt: skip


def _shown(rows: list[Any]) -> list[ManifestRow]:
    """Return the images of a group's rows."""
    return [row for row in rows if isinstance(row, ManifestRow)]


def spread(groups: dict[str, list[Any]], limit: int) -> list[str]:
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
