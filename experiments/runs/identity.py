"""What identifies a run: the settings that its images depend on, and the weights, machine and software that made them.

Its id is a hash of both.
"""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from eval.files import canonical_json, remembered_hash
from experiments import PROJECT
from experiments.configs import METADATA, build, flag, leaves, without
from experiments.methods.method import Method
from experiments.prompts import PromptSet
from experiments.runs import checkpoints

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1


def short_digest(value: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of `value` in canonical JSON: of a run's identity, its id."""
    return hashlib.sha256(canonical_json(value, compact=True).encode()).hexdigest()[:12]


def request(cfg: DictConfig, method: Method | None = None) -> dict[str, Any]:
    """Return what the configuration asks for, as far as it affects pixels: no weights or machine needed to know it.

    A `method` that is given stands in place of the configured one.

    Raises:
        ValueError: a setting is out of range.
    """
    method = build(cfg.method) if method is None else method
    return {
        **request_apart(cfg),
        "method": {"name": method.name, "settings": json.loads(canonical_json(method.settings()))},
    }


def request_apart(cfg: DictConfig) -> dict[str, Any]:
    """Return what `request` does, the method apart; what means the same is spelled the same."""
    prompts: PromptSet = build(cfg.prompts)
    return {
        "version": GENERATION_VERSION,
        "model": {
            # Key by key: to resolve all of a model's configuration takes a tenth of a second.
            **{key: cfg.model[key] for key in ("name", "kind", "architecture", "revision", "variant")},
            "source": checkpoints.canonical_source(cfg.model.source),
            "dtype": str(checkpoints.torch_dtype(cfg.model)).removeprefix("torch."),
            "call": checkpoints.call_arguments(cfg.model),
        },
        "prompts": {
            "name": prompts.name,
            "split": prompts.split,
            "images_per_prompt": prompts.images_per_prompt,
            "groups": [[group.category, group.prompt, group.seed] for group in prompts.groups()],
        },
        "compile": flag(cfg, "compile"),
    }


def made_by(method: Method, weights: str | None, device: str) -> dict[str, Any]:
    """Return what may change pixels beside the request: weights, machine, software and the method's version."""
    return {
        "weights": weights,
        "machine": {
            # The model of a GPU, since kernels differ; CPUs differ less, and have no name that is the same everywhere.
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.device(device).type,
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
        "code": method.version or None,  # the baseline has none: what all runs share is in the request
    }


def current_commit() -> str:
    """Return the checkout's commit, marked where code, configuration or models differ from it."""
    git = ["git", "-C", str(PROJECT)]
    code = ["--", "negtome", "eval", "experiments", "conf", "models"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return "unknown"
    return commit + ("+changes" if changed.strip() else "")


def environment(device: str) -> dict[str, Any]:
    """Return by what, when and where images are made now, as far as it is in no run id.

    `cpu` is the set of instructions that torch uses, by which images differ in their last digits; None on a GPU.
    """
    return {
        "commit": current_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability() if torch.device(device).type == "cpu" else None,
    }


def config_digest(cfg: DictConfig) -> str:
    """Return a digest of what is asked for, a method as its configuration spells it: none is built, no encoder loaded.

    Pictures and weights that a method is given count by their content, wherever they lie.

    Raises:
        ValueError: a setting is out of range.
    """
    # Wherever things are computed and verdicts are kept, and whatever is said of a method.
    spelled = without(OmegaConf.to_container(cfg.method, resolve=True), "device", "decisions", *METADATA)
    for key, value in leaves(spelled):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"method.{key} must be a finite number, got {value}")
    named = [get_object(name) for name in re.findall('"_target_":"(.+?)"', canonical_json(spelled, compact=True))]
    versions = [one.version for one in named if isinstance(one, type) and issubclass(one, Method)]
    return short_digest([request_apart(cfg), _by_content(spelled), versions])


def code_digest(asked: str, weights: str | None, metric_version: int) -> str:
    """Return a digest of all that is declared of a number: what is asked for (`config_digest`), weights and metric.

    A table keeps it, so that one of other settings, weights or versions is found out, on any machine.
    """
    return short_digest([asked, weights, metric_version])


def _by_content(spec: Any) -> Any:
    """Return a configuration with what its folders and files hold in the place of their names."""
    if isinstance(spec, dict):
        return {key: _by_content(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [_by_content(value) for value in spec]
    if isinstance(spec, str) and "/" in spec and os.path.isdir(folder := PROJECT / spec):
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return [[path.relative_to(folder).as_posix(), remembered_hash(path)] for path in files]
    if isinstance(spec, str) and "/" in spec and os.path.isfile(file := PROJECT / spec):
        return remembered_hash(file)
    return spec
