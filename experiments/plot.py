"""Draw an experiment's figures from its table, and grids of its images.

    python -m experiments plot experiment=diversity
    python -m experiments plot experiment=diversity style=paper width=3.25

What a table calls for is drawn from the CSV alone; an image grid sets the same groups, from the same noises, side by
side for every method. With style=paper the figures are PDFs of exactly `width` inches (default: 3.25, a column), with
fonts and lines of that size, in the folder `paper` beside the others. The notebooks and the report call the same
functions, those of `experiments.figures`.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path

from experiments.figures import called_for
from experiments.figures.image_grid import image_grid, worth_showing
from experiments.figures.style import save, using
from experiments.methods.assets import read_assets
from experiments.plan import Plan
from experiments.runs.store import Run
from experiments.tables.columns import read_table


def plot(plan: Plan) -> list[Path]:
    """Write the experiment's figures into the results folder and return their paths."""
    frame = read_table(plan.name, plan.results)
    files = []
    for name, (figure, _) in called_for(frame).items():
        files.append(save(figure, plan.result_file(name)))
    for model in dict.fromkeys(spec.cfg.model.name for spec in plan.runs):
        specs = [spec for spec in plan.runs if spec.cfg.model.name == model]
        shown = worth_showing(list(dict.fromkeys(map(Run.of, specs))), frame)  # equal settings are one run
        assets = read_assets(specs[0].cfg.model.copyright.guidance) if plan.cfg.primary.resemblance else None
        leading = None if assets is None else {asset.name: asset.file for asset in reversed(assets)}
        sheet = image_grid(list(shown), list(shown.values()), leading)
        files.append(save(sheet, plan.result_file(f"grid_{model}")))
    return files


def main(argv: list[str], plan: Plan | None = None) -> None:
    plan = plan or Plan.of(argv)
    with using(plan.cfg.style, plan.cfg.width):
        files = plot(plan)
    for file in files:
        print(file)
