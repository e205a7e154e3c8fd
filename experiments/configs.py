"""The configurations that a command line stands for, sweeps expanded: what Hydra's own multirun would launch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments import PROJECT


def expand(overrides: list[str]) -> list[DictConfig]:
    """Compose every configuration of `overrides`, the experiment's own sweep included.

    Args:
        overrides: as on the command line of `experiments.generate`, for example
            `["experiment=diversity", "model=sdxl", "method.alpha=0.3,0.9"]`.

    Returns:
        One composed configuration a run, in the order of Hydra's basic sweeper (the last axis varies fastest).

    Raises:
        hydra.errors.HydraException: an unknown group, option or key.
    """
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return list(_composed(_jobs(overrides)))


def _composed(jobs: Iterable[list[str]]) -> Iterator[DictConfig]:
    """Compose each job; those that name the same files once, since reading and merging them takes nearly all the time.

    Hydra itself applies values to what the files make, and nothing of the files depends on a value.
    """
    loader, bases = GlobalHydra.instance().config_loader(), {}
    for job in jobs:
        files, values = [], []
        for text, override in zip(job, OverridesParser.create().parse_overrides(job), strict=True):
            names = loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
            # What is for Hydra's own node, which a composed configuration no longer has, is its affair.
            if names or override.is_hydra_override():
                files.append(text)
            else:
                values.append(override)
        if (key := tuple(files)) not in bases:
            bases[key] = compose("config", files)
        cfg = copy.deepcopy(bases[key])
        loader._apply_overrides_to_config(values, cfg)
        yield cfg


def _jobs(overrides: list[str]) -> Iterator[list[str]]:
    """List each run's overrides; to be called where Hydra is initialised."""
    parse = OverridesParser.create().parse_overrides
    fixed = [
        text for text, override in zip(overrides, parse(overrides), strict=True) if not override.is_sweep_override()
    ]
    params = compose("config", fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
    axes = [f"{key}={value}" for key, value in params.items()] + list(overrides)
    (batch,) = BasicSweeper.split_arguments(parse(axes), max_batch_size=None)
    yield from (list(job) for job in batch)


def first(overrides: list[str]) -> DictConfig:
    """Compose the first configuration of `expand`, and no other: what all of an experiment share."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose("config", next(_jobs(overrides)))


def flag(cfg: DictConfig, name: str) -> bool:
    """Return a setting that is either true or false.

    Raises:
        ValueError: it is anything else, as the text "no", which Python takes for true.
    """
    if not isinstance(cfg[name], bool):
        raise ValueError(f"{name} must be true or false, got {cfg[name]!r}: give {name}=true or {name}=false")
    return cfg[name]


def build(spec: DictConfig) -> Any:
    """Instantiate what a configuration describes.

    Raises:
        FileNotFoundError, ValueError: those of the class itself, which say what to do, without Hydra's wrapping.
    """
    try:
        return instantiate(spec)
    except InstantiationException as error:
        if isinstance(error.__cause__, (FileNotFoundError, ValueError)):
            raise error.__cause__ from None
        raise
