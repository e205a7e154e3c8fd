"""The identity of a run: the settings that its images depend on, and the weights, machine and software that made them.

A run's id is a hash of both.
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
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from eval.files import cached_hash, canonical_json
from experiments import PROJECT
from experiments.configs import METADATA, build, flag, leaves
from experiments.methods.method import Method
from experiments.prompts import PromptSet
from experiments.runs import checkpoints

#: Settings of methods that do not affect pixels: the device, the file of records and what describes the method.
WITHOUT_EFFECT = ("device", "audit", *METADATA)
#: Settings of methods that were added after tables were published: digests leave them out where they are null.
LATER_SETTINGS = ("step_range",)
#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1
#: Classes of methods that were renamed after tables were published, whose digests hash the earlier name.
EARLIER_TARGETS = {
    "experiments.methods.apg.APG": "experiments.methods.projected_guidance.ProjectedGuidance",
    "experiments.methods.guidance.IntervalGuidance": "experiments.methods.guidance.LimitedInterval",
    "experiments.methods.nag.NAG": "experiments.methods.attention_guidance.AttentionGuidance",
    "experiments.methods.spell.SPELL": "experiments.methods.shield.Shield",
    "experiments.methods.spell.SPELLFromAssets": "experiments.methods.shield.ShieldFromAssets",
}


def short_digest(value: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of `value` in canonical JSON; for a run's identity, its id."""
    return hashlib.sha256(canonical_json(value, compact=True).encode()).hexdigest()[:12]


def request(cfg: DictConfig, method: Method) -> dict[str, Any]:
    """Return the settings of a configuration that affect pixels; they do not depend on weights or the machine.

    Raises:
        ValueError: a setting is out of range.
    """
    return {
        **request_without_method(cfg),
        "method": {"name": method.name, "settings": json.loads(canonical_json(method.settings()))},
    }


def request_without_method(cfg: DictConfig) -> dict[str, Any]:
    """Return `request` without the method; equal settings are spelled the same."""
    prompts: PromptSet = build(cfg.prompts)
    return {
        "version": GENERATION_VERSION,
        "model": {
            # Key by key: resolving all of a model's configuration takes a tenth of a second.
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


def provenance(method: Method, weights: str | None, device: str) -> dict[str, Any]:
    """Return everything else that may change pixels: weights, machine, software and the method's version."""
    return {
        "weights": weights,
        "machine": {
            "device": kind_of_device(device),
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
        "code": method.version or None,  # the baseline has none: GENERATION_VERSION is in the request
    }


def kind_of_device(device: str) -> str:
    """Return the name of a GPU, since kernels differ; of other devices the type: CPUs differ less."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.device(device).type


def current_commit() -> str:
    """Return the checkout's commit, with a mark if code, configuration or models differ from it."""
    commit = git(PROJECT, "rev-parse", "HEAD")
    changed = git(PROJECT, "status", "--porcelain", "--", "negtome", "eval", "experiments", "conf", "models")
    if commit is None or changed is None:
        return "unknown"
    return commit + ("+changes" if changed else "")


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints about a checkout; None if it fails, as in an unpacked archive."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(device: str) -> dict[str, Any]:
    """Return the facts about this moment and machine that are not part of the run id.

    `cpu` is the instruction set that torch uses, which affects the last digits of images; None on a GPU.
    """
    return {
        "commit": current_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability() if torch.device(device).type == "cpu" else None,
    }


def config_digest(cfg: DictConfig) -> str:
    """Return a digest of a configuration's settings, without building the method or loading an encoder.

    Images and weights of a method are hashed by their content, wherever they lie.

    Raises:
        ValueError: a setting is out of range.
    """
    method = OmegaConf.to_container(cfg.method, resolve=True)
    for key, value in leaves(method):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"method.{key} must be a finite number, got {value}")
    targets = [get_object(name) for name in re.findall('"_target_":"(.+?)"', canonical_json(method, compact=True))]
    versions = [target.version for target in targets if isinstance(target, type) and issubclass(target, Method)]
    return short_digest([request_without_method(cfg), _by_content(method), versions])


def code_digest(settings: str, weights: str | None, metric_version: int) -> str:
    """Return a digest of a number's settings (`config_digest`), weights and metric version.

    Tables keep it, so that any machine can detect a table of other settings, weights or versions.
    """
    return short_digest([settings, weights, metric_version])


def _by_content(spec: Any) -> Any:
    """Return the settings of a method that affect pixels; digests of content replace the names of folders and files."""
    if isinstance(spec, dict):
        unused = {*WITHOUT_EFFECT, *(key for key in LATER_SETTINGS if spec.get(key) is None)}
        return {key: _by_content(value) for key, value in spec.items() if key not in unused}
    if isinstance(spec, list):
        return [_by_content(value) for value in spec]
    if isinstance(spec, str) and "/" in spec and os.path.isdir(folder := PROJECT / spec):
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md")  # cards
        return [[path.relative_to(folder).as_posix(), cached_hash(path)] for path in files]
    if isinstance(spec, str) and "/" in spec and os.path.isfile(file := PROJECT / spec):
        return cached_hash(file)
    return EARLIER_TARGETS.get(spec, spec) if isinstance(spec, str) else spec
