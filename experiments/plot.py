"""Draw an experiment's figures from its table, and grids of its images.

    python -m experiments plot experiment=diversity
    python -m experiments plot experiment=diversity style=paper width=3.25

What a table calls for is drawn from the CSV alone; an image grid sets the same groups, from the same seeds, side by
side for every method. With style=paper the figures are PDFs of exactly `width` inches (default: 3.25, a column), with
fonts and lines of that size, in the folder `paper`. The notebooks and the report call the same
functions, those of `experiments.figures`.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import content_hash
from eval.images import MANIFEST, WITHHELD
from experiments import PROJECT
from experiments.figures import figures_for, file_name
from experiments.figures.image_grid import ImageGrid, grid_of_runs, select_runs
from experiments.figures.style import find_unchanged, save, using
from experiments.methods.assets import read_assets
from experiments.plan import Plan, RunSpec
from experiments.runs.identity import short_digest
from experiments.runs.store import Run
from experiments.tables.columns import by_steps, primary_pair, read_table
from experiments.tables.groups import read_groups, values_of_run

#: Files that decide how a figure looks.
SOURCES = ("experiments/figures/*.py", "experiments/tables/*.py", "conf/method/*.yaml")


def plot(plan: Plan) -> list[Path]:
    """Write the experiment's figures into its folder of results and return their paths.

    A figure stays as it is where nothing changed that it depends on.
    """
    frame = read_table(plan.name, plan.results)
    sources = [content_hash(file) for pattern in SOURCES for file in sorted(PROJECT.glob(pattern))]
    common = [sources, content_hash(plan.result_file())]
    files = []
    for name, (figure, _) in figures_for(frame).items():
        files.append(save(figure, plan.result_file(name), short_digest(common)))
    frame = by_steps(frame)
    models = frame.drop_duplicates("run_id").set_index("run_id")["model"]
    specs_of: dict[str, list[RunSpec]] = {}
    for spec in plan.runs:
        specs_of.setdefault(models[Run.of(spec).id], []).append(spec)
    for model, specs in specs_of.items():
        files.append(_plot_grid(plan, specs, frame, common, file_name(model)))
    return files


def _plot_grid(plan: Plan, specs: list[RunSpec], frame: pd.DataFrame, common: list[Any], name: str) -> Path:
    """Write the image grid of a model's runs, at one number of steps; `name` stands for both in the file's name."""
    model, chosen = specs[0].cfg.model, plan.cfg.grid
    specs = [spec for method in chosen or [None] for spec in specs if method in (None, spec.cfg.method.name)]
    shown = select_runs(list(dict.fromkeys(map(Run.of, specs))), frame)  # equal settings are one run
    leading = values = None
    if chosen and len(shown) > 1:
        values = _values(plan, list(shown), primary_pair(frame)[0])
    if plan.cfg.primary.resemblance:
        leading = {asset.name: asset.file for asset in reversed(read_assets(model.copyright.guidance))}
    manifests = [run.folder / name for run in shown for name in (MANIFEST, WITHHELD)]
    shown_files = [content_hash(file) for file in (*manifests, *(leading or {}).values()) if file.exists()]
    path, inputs = plan.result_file(f"grid_{name}"), short_digest([common, list(shown.values()), shown_files])
    if unchanged := find_unchanged(path, ImageGrid.kind, inputs):
        return unchanged
    return save(grid_of_runs(list(shown), list(shown.values()), leading, values), path, inputs)


def _values(plan: Plan, runs: list[Run], metric: str) -> list[dict[str, float]]:
    """Return a metric's values of groups, of each run."""
    groups = read_groups(plan.results, plan.name)
    return [{value["group"]: value["value"] for value in values_of_run(groups, run.id, metric)} for run in runs]


def main(argv: list[str], plan: Plan | None = None) -> None:
    """Run the command."""
    plan = plan or Plan.of(argv)
    with using(plan.cfg.style, plan.cfg.width):
        files = plot(plan)
    for file in files:
        print(file)
