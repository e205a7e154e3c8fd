"""What a run is: what was asked for, and by which weights, machine and software; its id is a hash of both."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import PROJECT, pipelines
from experiments.configs import build, flag
from experiments.methods.method import Method
from experiments.prompts import PromptSet

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1


def canonical(value: Any) -> str:
    """Return `value` as JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def short_digest(value: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of `value` in canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def run_id(identity: dict[str, Any]) -> str:
    """Return the id of the run of this identity: `request`, and what `made_by` returns."""
    return short_digest(identity)


def request(cfg: DictConfig, method: Method | None = None) -> dict[str, Any]:
    """Return what the configuration asks for, as far as it affects pixels: no weights or machine needed to know it.

    Args:
        cfg: the composed configuration.
        method: in place of the configured one.
    """
    method = build(cfg.method) if method is None else method
    return {**request_apart(cfg), "method": {"name": method.name, "settings": json.loads(canonical(method.settings()))}}


def request_apart(cfg: DictConfig) -> dict[str, Any]:
    """Return what `request` does, the method apart; what means the same is spelled the same."""
    prompts: PromptSet = build(cfg.prompts)
    return {
        "version": GENERATION_VERSION,
        "model": {
            # Key by key: to resolve all of a model's configuration takes a tenth of a second.
            **{key: cfg.model[key] for key in ("name", "kind", "architecture", "revision", "variant")},
            "source": pipelines.canonical_source(cfg.model.source),
            "dtype": str(pipelines.torch_dtype(cfg.model)).removeprefix("torch."),
            "call": pipelines.call_arguments(cfg.model),
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
