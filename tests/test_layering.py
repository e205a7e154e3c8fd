"""Importing is light. Which package may import which stands in pyproject.toml and is checked by `make lint`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE_TORCH = ["hydra", "pandas", "matplotlib", "open_clip", "torchmetrics", "transformers", "diffusers"]
#: In this order in one process, which imports torch once: modules, and the packages that importing them must not load.
HEAVY = {
    "negtome": ["torch", "yaml"],
    "negtome.__main__": ["torch", "diffusers", "transformers", "PIL", "numpy"],
    "negtome.guard.__main__": ["torch", "transformers", "tokenizers", "httpx2", "jinja2"],
    "negtome.attachment": BESIDE_TORCH,
    "experiments.collect": ["torchmetrics", "transformers", "diffusers"],
}


def test_importing_is_light():
    lines = [
        f"import {module}; print([name for name in {heavy} if name in sys.modules])" for module, heavy in HEAVY.items()
    ]
    command = [sys.executable, "-c", "\n".join(["import sys", *lines])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"] * len(HEAVY)
