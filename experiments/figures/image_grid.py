"""Images side by side: the same groups of several runs, those of them that there is room for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from eval.files import canonical_json
from eval.images import ManifestRow, WithheldRow, group_rows, read_manifest, read_withheld
from experiments.figures.sheet import Sheet, contact_sheet
from experiments.figures.style import title
from experiments.runs.store import Run
from experiments.tables.columns import primary_pair
from experiments.tables.pages import run_labels
from experiments.tables.selection import chosen_run, pareto_front


def image_grid(
    runs: Sequence[Run],
    titles: Sequence[str],
    leading: Mapping[str, Path] | None = None,
    groups: int = 6,
) -> Sheet:
    """Set the same groups side by side: one row a group, one block of images a run, or why they are withheld.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        titles: what to call each.
        leading: category -> a picture to stand before the runs' images, such as a protected asset; only groups of
            these categories are shown. None: all, without such a picture.
        groups: rows, each of another category, spread evenly over the groups' names.

    Raises:
        ValueError: the runs share no group, or an image is damaged.
    """
    manifests = [
        group_rows(read_manifest(run.folder)) | {row.group_id: row for row in read_withheld(run.folder)} for run in runs
    ]
    first = {group: rows if isinstance(rows, WithheldRow) else rows[0] for group, rows in manifests[0].items()}
    order = sorted(first, key=lambda group: (first[group].prompt_id, first[group].group_seed))
    category = {group: first[group].category for group in order}
    shared = [group for group in category if all(group in manifest for manifest in manifests)]
    shared = [group for group in shared if leading is None or category[group] in leading]
    if not shared:
        raise ValueError("The runs share no group: generate them with the same prompts")
    firsts = sorted({category[group]: group for group in reversed(shared)}.values())
    rows = []
    for group in _spread(firsts, groups):
        blocks = [_block(run, manifest[group]) for run, manifest in zip(runs, manifests, strict=True)]
        blocks = blocks if leading is None else [[leading[category[group]]], *blocks]
        rows.append((first[group].prompt, blocks))
    return contact_sheet([*titles] if leading is None else ["asset", *titles], rows)


def _block(run: Run, found: list[ManifestRow] | WithheldRow) -> list[Path] | str:
    return str(found) if isinstance(found, WithheldRow) else [run.folder / row.path for row in found]


def worth_showing(runs: Sequence[Run], frame: pd.DataFrame, most: int = 6) -> dict[Run, str]:
    """Return the runs of a model that an image grid has room for, of a sweep some that stand for the others.

    Where the baseline was swept along, as with guidance, those at both ends; else the baseline and settings spread
    evenly over the Pareto front, the chosen one among them.

    Args:
        runs: of one model.
        frame: the experiment's CSV.
        most: how many at most.

    Returns:
        Run -> what to call it.
    """
    requests = {run: run.identity["request"] for run in runs}
    shown = list(runs)
    calls = [canonical_json(request["model"]["call"]) for request in requests.values()]
    if len(runs) > most and len(set(calls)) > 1:
        shown = [run for run, call in zip(runs, calls, strict=True) if call in (calls[0], calls[-1])][:most]
    elif len(runs) > most:
        part = frame[frame["run_id"].isin([run.id for run in runs])]
        measured = (part, *primary_pair(part), part["model"].iloc[0])
        kept = {*_spread(pareto_front(*measured), most - 2), chosen_run(*measured)}
        shown = [run for run in runs if requests[run]["method"]["name"] == "none" or run.id in kept]
    labels = run_labels(frame)
    return {
        run: f"{requests[run]['model']['name']}: {title(labels[run.id], requests[run]['method']['name'], brief=True)}"
        for run in shown
    }


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the names, the first and the last among them, spread evenly."""
    count = min(most, len(names))
    return [names[round(place * (len(names) - 1) / max(count - 1, 1))] for place in range(count)]
