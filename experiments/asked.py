"""What a configuration asks for, as far as it affects pixels, and which run answers it.

The act that generates notes in `<outputs>/<experiment>/asked.json` which run it opened for each configuration; those
after it compose the same configurations and look their runs up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from eval.files import read_json, write_text
from experiments import PROJECT, pipelines, project_path
from experiments.configs import build, flag, without
from experiments.locks import locked
from experiments.makers import GENERATION_VERSION
from experiments.methods.method import Method
from experiments.prompts import PromptSet

#: Beside the runs, in a folder of an experiment's name: digest -> run, model and method.
ASKED = "asked.json"

#: Keys of a model's configuration that affect pixels.
MODEL = ("name", "kind", "architecture", "source", "revision", "variant", "dtype", "call")


def canonical(value: Any) -> str:
    """Return `value` as JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(identity: dict[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of `identity` in canonical JSON."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]


def request(cfg: DictConfig, method: Method | None = None) -> dict[str, Any]:
    """Return what the configuration asks for, as far as it affects pixels: no weights or machine needed to know it.

    Args:
        cfg: the composed configuration.
        method: in place of the configured one.
    """
    method = build(cfg.method) if method is None else method
    prompts: PromptSet = build(cfg.prompts)
    # What means the same is spelled the same.
    model = _model(cfg) | {
        "source": pipelines.canonical_source(cfg.model.source),
        "dtype": str(pipelines.torch_dtype(cfg.model)).removeprefix("torch."),
        "call": pipelines.call_arguments(cfg.model),
    }
    return {
        "version": GENERATION_VERSION,
        "model": model,
        "method": {"name": method.name, "settings": json.loads(canonical(method.settings()))},
        "prompts": {
            "name": prompts.name,
            "split": prompts.split,
            "images_per_prompt": prompts.images_per_prompt,
            "groups": [[group.category, group.prompt, group.seed] for group in prompts.groups()],
        },
        "compile": flag(cfg, "compile"),
    }


def asked(cfg: DictConfig, method: DictConfig | None = None) -> str:
    """Return a digest of the same as it is spelled in the configuration: nothing is built, no encoder loaded.

    Args:
        cfg: the composed configuration.
        method: in place of the configured one.
    """
    parts = (cfg.method if method is None else method, cfg.prompts)
    # Wherever things are computed, whatever is said of a method, and wherever the checkout lies.
    spelled = [without(OmegaConf.to_container(part, resolve=True), "device", "about") for part in parts]
    named = [get_object(name) for name in re.findall('"_target_":"(.+?)"', canonical(spelled))]
    versions = [one.version for one in named if isinstance(one, type) and issubclass(one, Method)]
    text = canonical([*spelled, versions, GENERATION_VERSION, _model(cfg), cfg.compile]).replace(str(PROJECT), ".")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _model(cfg: DictConfig) -> dict[str, Any]:
    # Key by key: to resolve all of a model's configuration takes a tenth of a second.
    call = OmegaConf.to_container(cfg.model.call, resolve=True)
    return {key: call if key == "call" else cfg.model[key] for key in MODEL}


def note(runs: Iterable[tuple[DictConfig, str]]) -> None:
    """Note the ids of the runs that were opened for configurations, in place of those before."""
    files: dict[Path, dict[str, dict[str, str]]] = {}
    for cfg, run in runs:
        entry = {"run": run, "model": cfg.model.name, "method": cfg.method.name}
        files.setdefault(asked_file(cfg), {})[asked(cfg)] = entry
    for file, entries in files.items():
        with locked(file.with_name(f".{ASKED}.lock")):
            before = noted(file)
            if not entries.items() <= before.items():
                write_text(file, json.dumps(before | entries, indent=1) + "\n")


def noted(file: Path) -> dict[str, dict[str, str]]:
    """Return what `note` wrote into a file: digest -> run, model and method."""
    return read_json(file) if file.exists() else {}


def asked_file(cfg: DictConfig) -> Path:
    return project_path(cfg.outputs) / cfg.name / ASKED


def experiments_of(outputs: Path) -> dict[str, list[str]]:
    """Return, by the id of each run, the names of the experiments that asked for it."""
    found: dict[str, list[str]] = {}
    for file in sorted(outputs.glob(f"*/{ASKED}")):
        for run in dict.fromkeys(entry["run"] for entry in noted(file).values()):
            found.setdefault(run, []).append(file.parent.name)
    return found
