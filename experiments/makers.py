"""What makes images beside the settings of a run: weights, machine, software, and the checkout."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from experiments import PROJECT
from experiments.methods.method import Method

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1


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
