"""The images of a table's runs, group by group, with the scores of each group."""

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
from experiments.compose import first
from experiments.figures.style import title
from experiments.methods.assets import read_assets
from experiments.report.pictures import Pictures, is_link, reduced
from experiments.runs import catalogue
from experiments.runs.store import RUNS, Run
from experiments.tables import pages
from experiments.tables.columns import CALL, ROLES, format_setting, humanize

log = logging.getLogger(__name__)

#: Relative difference between a number in a table, which has six digits, and the same number in a file of scores.
ROUNDING = 1e-4
#: Packages whose versions are shown.
PACKAGES = ("python", "torch", "diffusers", "transformers")

Group = list[ManifestRow] | list[WithheldRow]


def read_runs(frame: pd.DataFrame, outputs: Path) -> list[dict[str, Any]]:
    """Return the runs of a table with their settings and, for runs on this machine, their groups and scores."""
    labels = pages.run_labels(frame)
    runs = []
    for (run_id, model), rows in frame.groupby(["run_id", "model"], sort=False):
        row = rows.iloc[0]
        run, groups, environment, state = Run(outputs / RUNS / run_id), None, {}, "not on this machine"
        if run.complete:
            try:
                groups, environment = _read_groups(run), run.identity["machine"] | run.environment
                state = f"{RUNS}/{run_id}"
            except (OSError, ValueError, KeyError) as error:
                log.warning("The images of %s are left out: %s", run.folder, error)
                state = "cannot be read"
        label = title(labels[run_id], row["method"])
        settings = {"model": model, "method": label, "run": run_id}
        settings |= {one.heading: one.text(row) for one in dict.fromkeys((*CALL, *catalogue.settings()))}
        settings |= {column: format_setting(row[column]) for column in ("device", "commit")}
        settings |= {package: environment.get(package, "") for package in PACKAGES}
        settings["folder of its images"] = state
        runs.append(
            {
                "id": run_id, "baseline": _baseline(frame, row), "model": model, "method": row["method"],
                "title": label, "folder": run.folder, "manifest": groups,
                "scores": {} if groups is None else _read_scores(run, rows), "settings": settings,
            }
        )  # fmt: skip
    return runs


def _baseline(frame: pd.DataFrame, row: pd.Series) -> str | None:
    """Return the id of the run that differs from a run only by having no method; None if there is none."""
    if row["method"] == "none":
        return None
    columns = ["model", *(column for setting in CALL for column in setting.columns)]
    baselines = frame[frame["method"] == "none"]
    alike = baselines[columns].map(format_setting).eq(row[columns].map(format_setting)).all(axis=1)
    return next(iter(baselines.loc[alike, "run_id"]), None)


def _read_groups(run: Run) -> dict[str, Group]:
    """Return the images of a run by group; for a group that is withheld, the row with the reason.

    Raises:
        OSError, ValueError: images are missing or links, or the manifest is damaged.
    """
    manifest = group_rows(read_manifest(run.folder))
    paths = [run.folder / row.path for rows in manifest.values() for row in rows]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} images are gone, the first {missing[0]}")
    if any(is_link(path, run.folder) for path in paths):
        raise ValueError("expected images of its own, got links")
    return manifest | {row.group_id: [row] for row in read_withheld(run.folder)}


def _read_scores(run: Run, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the primary metrics of a run's groups, if their mean is the number in the table."""
    scores = {}
    for _, row in rows[rows["primary"].isin(ROLES) & rows["value"].notna()].iterrows():
        path = scores_path(run.folder / METRICS, row["metric"], row["encoder"])
        if not path.is_file() or is_link(path, run.folder):
            continue
        try:
            document = read_document(path)
        except ValueError as error:
            log.warning("The scores of %s are left out: %s", run.folder, error)
            continue
        if document["aggregate"] != "mean" or not all("value" in group for group in document["groups"]):
            continue  # a score of each category, or of the whole set
        if not np.isclose(document["value"], row["value"], rtol=ROUNDING):
            log.warning("%s is left out: the table has %g, and it %g", path, row["value"], document["value"])
            continue
        scores[row["metric"]] = {group["group"]: group["value"] for group in document["groups"]}
    return scores


def gallery(
    name: str, model: str, runs: list[dict[str, Any]], sheet: Path | None, pictures: Pictures, limit: int
) -> dict[str, Any]:
    """Return what the page shows of a model's images.

    Args:
        name: of the table.
        model: of the runs.
        runs: as `read_runs` returns them.
        sheet: an image grid in results/, shown if no run is on this machine.
        pictures: to which the images are added.
        limit: the largest number of groups.
    """
    here = [run for run in runs if run["manifest"] is not None]
    rows_of = {group: rows for run in reversed(here) for group, rows in run["manifest"].items()}
    # The number of a group, and so its address, does not depend on the limit.
    numbers = {group: number for number, group in enumerate(spread(rows_of, len(rows_of)), 1)}
    assets = _asset_files(model) if any(map(_uses_references, here)) else {}
    groups = []
    for group in tqdm(spread(rows_of, limit), desc=f"{name} {model}", disable=None, leave=False):
        row, asset = rows_of[group][0], None
        if row.category in assets:
            asset = pictures.put(reduced(load_picture(assets[row.category])), "webp")
        strips = [_strip(run, group, here, pictures) for run in here]
        address = f"{name}/{model}/{numbers[group]}"
        groups.append({"address": address, "row": row, "asset": asset, "runs": strips})
    figure = None
    if sheet is not None and not here:
        figure = pictures.copy(
            sheet, f"a choice of the images of {model}, one row a prompt, one block of columns a method"
        )
    return {
        "model": model, "runs": runs, "n_groups": len(rows_of), "sheet": figure, "groups": groups,
        "metrics": list(dict.fromkeys(metric for run in here if run["baseline"] for metric in run["scores"])),
        "single": max((len(run["images"]) for group in groups for run in group["runs"]), default=0) == 1,
    }  # fmt: skip


def _strip(run: dict[str, Any], group: str, here: list[dict[str, Any]], pictures: Pictures) -> dict[str, Any]:
    """Return a run's images of a group, or the reason why there are none, and its scores against the baseline's."""
    rows = run["manifest"].get(group, [])
    images = _images(rows)
    baseline = next((number for number, other in enumerate(here) if other["id"] == run["baseline"]), None)
    scores, changes = [], {}
    for metric, values in run["scores"].items():
        if group not in values:
            continue
        text, before = f"{values[group]:.3g}", None
        if baseline is not None:
            before = here[baseline]["scores"].get(metric, {}).get(group)
        if before is not None:
            changes[metric] = values[group] - before
            text += f" ({changes[metric]:+.2g})"
        scores.append({"label": humanize(metric), "text": text})
    return {
        "title": run["title"], "method": run["method"], "baseline": baseline,
        "images": [pictures.tile(run["folder"] / row.path) for row in images],
        "references": images[0].references if images else None,
        "withheld": rows[0] if rows and not images else None,
        "scores": scores, "changes": changes,
    }  # fmt: skip


def _images(rows: Group) -> list[ManifestRow]:
    return [row for row in rows if isinstance(row, ManifestRow)]


def _uses_references(run: dict[str, Any]) -> bool:
    return any(row.references for rows in run["manifest"].values() for row in _images(rows)[:1])


def spread(groups: dict[str, Group], limit: int) -> list[str]:
    """Return at most `limit` groups: the first of every category, then the second of every category, and so on."""
    by_category: dict[str, list[str]] = {}
    for group in sorted(groups):
        by_category.setdefault(groups[group][0].category, []).append(group)
    turns = itertools.zip_longest(*by_category.values())
    chosen = [group for turn in turns for group in turn if group is not None][:limit]
    return sorted(chosen, key=lambda group: (groups[group][0].category, group))


def _asset_files(model: str) -> dict[str, Path]:
    """Return one image of every protected concept that is configured for a model."""
    try:
        assets = read_assets(first([f"model={model}"]).model.copyright.guidance)
    except (HydraException, OSError, ValueError):
        return {}  # the model or its folder of concepts is not here
    return {asset.name: asset.file for asset in reversed(assets)}
