"""The acts of the benchmark: generate, evaluate, tabulate, plot.

The only package that imports Hydra, pandas or matplotlib.
"""

from pathlib import Path

from omegaconf import OmegaConf

#: The checkout: relative paths of the configuration are relative to it, whatever the working directory.
PROJECT = Path(__file__).resolve().parent.parent


def project_path(path: str | Path) -> Path:
    """Return `path` made absolute, relative ones taken from the checkout."""
    return PROJECT / Path(path).expanduser()


# `${project:models/mini-clip}` in conf/: a file of the checkout.
OmegaConf.register_new_resolver("project", lambda path: str(project_path(path)), replace=True)
