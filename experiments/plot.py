"""Act 4: an experiment's table and images become its figures.

    python -m experiments.plot experiment=diversity
    python -m experiments.plot experiment=diversity style=paper width=3.25

What a table calls for is drawn from the CSV alone; an image grid sets the same groups, from the same noises, side by
side for every method. With style=paper the figures are PDFs of exactly `width` inches (default: 3.25, a column), with
fonts and lines of that size, in the folder `paper` of the results. The notebooks and the report call the same
functions, those of `experiments.figures`.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path

from omegaconf import DictConfig

from experiments import project_path
from experiments.configs import expand
from experiments.figures import called_for
from experiments.figures.image_grid import image_grid, worth_showing
from experiments.figures.style import save, using
from experiments.methods.assets import read_assets
from experiments.runs import Run
from experiments.tables import read_table


def plot(configs: list[DictConfig]) -> list[Path]:
    """Write the experiment's figures into the results folder and return their paths."""
    cfg = configs[0]
    results = project_path(cfg.results)
    frame = read_table(cfg.name, cfg.results)
    files = []
    for name, (figure, _) in called_for(frame).items():
        files += save(figure, results / f"{cfg.name}_{name}")
    for model in dict.fromkeys(cfg.model.name for cfg in configs):
        # A grid of settings names its baseline more than once.
        chosen = [cfg for cfg in configs if cfg.model.name == model]
        shown = worth_showing(list(dict.fromkeys(Run.find(cfg) for cfg in chosen)), frame)
        assets = read_assets(chosen[0].model.copyright.guidance) if cfg.primary.resemblance else None
        leading = None if assets is None else {asset.name: asset.file for asset in reversed(assets)}
        sheet = image_grid(list(shown), list(shown.values()), leading)
        files += save(sheet, results / f"{cfg.name}_grid_{model}")
    return files


def main(argv: list[str], configs: list[DictConfig] | None = None) -> None:
    configs = configs or expand(argv, baselines=True)
    with using(configs[0].style, configs[0].width):
        files = plot(configs)
    for file in files:
        print(file)
