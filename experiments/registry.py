"""Which run answers what a configuration asks for.

The act that generates registers every run that is complete, a file a configuration in `<outputs>/<experiment>/asked/`;
the acts after it compose the same configurations and look their runs up.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from eval.files import read_json, remembered_hash, write_text
from experiments import PROJECT, project_path
from experiments.configs import without
from experiments.identity import canonical, request_apart, short_digest
from experiments.methods.method import Method

#: Where an experiment's folder names its runs.
ASKED = "asked"


def config_digest(cfg: DictConfig, method: DictConfig | None = None) -> str:
    """Return a digest of what is asked for, a method as its configuration spells it: none is built, no encoder loaded.

    Pictures and weights that a method is given count by their content, wherever they lie.

    Args:
        cfg: the composed configuration.
        method: in place of the configured one.
    """
    # Wherever things are computed, and whatever is said of a method.
    spelled = without(OmegaConf.to_container(cfg.method if method is None else method, resolve=True), "device", "about")
    named = [get_object(name) for name in re.findall('"_target_":"(.+?)"', canonical(spelled))]
    versions = [one.version for one in named if isinstance(one, type) and issubclass(one, Method)]
    return short_digest([request_apart(cfg), _by_content(spelled), versions])


def _by_content(spec: Any) -> Any:
    """Return a configuration with what its folders hold in the place of their names."""
    if isinstance(spec, dict):
        return {key: _by_content(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [_by_content(value) for value in spec]
    if isinstance(spec, str) and "/" in spec and os.path.isdir(folder := PROJECT / spec):
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return [[path.relative_to(folder).as_posix(), remembered_hash(path)] for path in files]
    return spec


def register(cfg: DictConfig, run: str) -> None:
    """Name the complete run that answers a configuration, in the place of an earlier one."""
    text = json.dumps({"run": run, "model": cfg.model.name, "method": cfg.method.name}, indent=1) + "\n"
    file = _file(cfg, config_digest(cfg))
    if not file.exists() or file.read_bytes() != text.encode():
        write_text(file, text)


def lookup(cfg: DictConfig, method: DictConfig | None = None) -> str:
    """Return the id of the run that answers a configuration; see `config_digest`.

    Raises:
        FileNotFoundError: none was completed; the message names the command.
        ValueError: the file that names it is damaged.
    """
    file = _file(cfg, config_digest(cfg, method))
    if not file.exists():
        name = (cfg.method if method is None else method).name
        raise FileNotFoundError(
            f"No complete run of model={cfg.model.name} method={name} with these settings is named in {file.parent}: "
            "run python -m experiments.generate with the same overrides, which keeps what is there"
        )
    return _read(file)["run"]


def _file(cfg: DictConfig, digest: str) -> Path:
    if not re.fullmatch(r"\w[\w.+-]*", str(cfg.name)):  # it names a folder of outputs, and files of results
        raise ValueError(f"expected a name without slashes and spaces, got {cfg.name!r}: give name=NAME")
    return project_path(cfg.outputs) / cfg.name / ASKED / f"{digest}.json"


def _read(file: Path) -> dict[str, str]:
    entry = read_json(file)
    if not isinstance(entry, dict) or not re.fullmatch("[0-9a-f]{12}", str(entry.get("run"))):
        raise ValueError(f"expected the id of a run in {file}, got other JSON: delete it and run experiments.generate")
    return entry


def experiments_of(outputs: Path) -> dict[str, list[str]]:
    """Return, by the id of each run, the names of the experiments that asked for it; damaged files name none."""
    found: dict[str, list[str]] = {}
    for file in sorted(outputs.glob(f"*/{ASKED}/*.json")):
        try:
            names = found.setdefault(_read(file)["run"], [])
        except ValueError:
            continue
        if (name := file.parents[1].name) not in names:
            names.append(name)
    return found
