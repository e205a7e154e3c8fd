"""What makes images beside the settings of a run: weights, machine, software, and the code of this checkout."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import negtome
from experiments import PROJECT
from experiments.methods.method import Method

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1

#: What makes the images, beside the run's settings and the software installed: other code may make others.
CODE = (
    *sorted(Path(negtome.__file__).parent.glob("*.py")),
    *(Path(__file__).with_name(f"{name}.py") for name in ("generate", "pipelines", "prompts")),
    *sorted(Path(__file__).with_name("methods").glob("*.py")),
)


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


@functools.cache
def maker(device: str) -> dict[str, str | None]:
    """Return what made a group and is in no run id: the CPU's instructions, where it computes, and a digest of `CODE`.

    Comments and layout of the code do not count, nor does the version of Python that reads it.
    """
    digest = hashlib.sha256()
    for file in CODE:
        digest.update(_tree(file.read_text(encoding="utf-8")).encode())
    capability = torch.backends.cpu.get_cpu_capability() if torch.device(device).type == "cpu" else None
    return {"cpu": capability, "generation_code": digest.hexdigest()[:12]}


def _tree(code: str) -> str:
    """Return the syntax tree of code in words, as Python 3.11 has it: 3.12 adds an empty list, 3.13 leaves all out."""
    shown = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    return ast.dump(ast.parse(code), **shown).replace(", type_params=[]", "")


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
    """Return by what, when and where images are made now, as far as it is in no run id."""
    return {
        "commit": current_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **maker(device),
    }
