"""The one setting by which a method is turned up: which methods have one, and which of its values is asked for.

A method's file in conf/method/ names it under `about.knob`: `setting`, its place in the file, and for each model
equally many `values`, the weakest first. `knob=2` then stands for the third of them, and `knob=chosen` for the one that
the rule of `experiments.choose.chosen_run` takes from the table of experiment=peers_grid.
"""

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import PROJECT, catalogue, project_path
from experiments.choose import chosen_run
from experiments.tables import primary_pair, read_table, spelled

#: The experiment that settings are chosen by.
GRID = "peers_grid"


def methods_of(model: str) -> list[str]:
    """Return the methods of conf/method/ that have a knob of their own for a model."""
    files = sorted((PROJECT / "conf" / "method").glob("*.yaml"))
    knobs = {file.stem: _about(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files}
    return [name for name, knob in knobs.items() if model in knob.get("values", {})]


def value_of(setting: str, cfg: DictConfig, default: Any) -> Any:
    """Return what `cfg.knob` asks for of a setting of the method, `default` where that is not its knob.

    A published checkpoint without values of its own has those of the small model of its architecture.

    Raises:
        FileNotFoundError: a chosen value is asked for, and the table was not made yet.
        ValueError: `knob` is out of range, or the method has no values for the model.
    """
    knob = _about(OmegaConf.to_container(cfg.method))
    if knob.get("setting") != setting:
        return default
    model = cfg.model.name
    values = knob["values"].get(model) or knob["values"].get(f"mini-{cfg.model.architecture}")
    if not values:
        raise ValueError(f"expected values of about.knob for model={model} in method={cfg.method.name}, got none")
    if cfg.knob == "chosen":
        return _chosen(cfg.method.name, setting.rpartition(".")[2], values, model, cfg.results)
    if not isinstance(cfg.knob, int) or not 0 <= cfg.knob < len(values):
        raise ValueError(f"knob must be null, chosen or from 0 to {len(values) - 1}, got {cfg.knob!r}")
    return values[cfg.knob]


def _about(spec: Any) -> dict[str, Any]:
    return spec.get("about", {}).get("knob", {})


def _chosen(method: str, setting: str, values: list[Any], model: str, results: str) -> Any:
    """Return the value that the rule takes from the table in `results`, or else from the published one.

    Where no value fulfils it, that is the weakest.
    """
    folder = next((one for one in (results, "results") if (project_path(one) / f"{GRID}.csv").exists()), results)
    column = next(one for one in catalogue.settings() if one.name == setting)
    row = _chosen_row(project_path(folder), method, model)
    if row is None:
        return values[0]
    found = [spelled(row[name]) for name in column.columns]
    for value in values:
        if list(map(spelled, column.cells({setting: value}).values())) == found:
            return value
    raise ValueError(
        f"expected {setting} among {values} for {method} on {model} in {folder}/{GRID}.csv, got {' to '.join(found)}: "
        f"make that table again with experiment={GRID}"
    )


@functools.cache
def _chosen_row(folder: Path, method: str, model: str) -> pd.Series | None:
    frame = read_table(GRID, folder)
    frame = frame[frame["method"].isin([method, "none"])]
    run = chosen_run(frame, *primary_pair(frame), model)
    return None if run is None else frame[frame["run_id"] == run].iloc[0]
