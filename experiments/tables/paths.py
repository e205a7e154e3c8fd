"""Where results lie: each experiment has a folder, `<results>/<experiment>/`, with its tables, pages and figures."""

from pathlib import Path

from experiments import project_path

#: Name of an experiment's table in its folder; the page beside it has the same name and the ending .md.
TABLE = "table.csv"
#: Folder of the published results.
PUBLISHED = "results"


def result_file(results: str | Path, experiment: str, name: str = TABLE) -> Path:
    """Return the path of a file of an experiment, by default of its table; relative paths start at the checkout."""
    return project_path(results) / experiment / name


def chosen_file(results: str | Path, experiment: str = "peers_grid") -> Path:
    """Return the file of the hyperparameters that `experiments.rank` chose from a sweep, by model and method."""
    return result_file(results, experiment, "chosen.yaml")
