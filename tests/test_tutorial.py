"""docs/tutorial.md, run from top to bottom as a reader would, with what it says of the outcome."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
INSTALL, *COMMANDS = [line.strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()][1:]


def run(command, folder, *more):
    """Run a line of the page in a folder that looks like the checkout."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, *more], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    for name in ("models", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_what_is_installed_is_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.fullmatch(r'pip install -e "\.\[(\w+)\]"', INSTALL).groups()
    assert extra in project["optional-dependencies"]
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "yaml"}, "every block is of a kind that is run here"


def test_its_policy_is_decided_and_tested(folder):
    (policy,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (folder / "policy.yaml").write_text(policy, encoding="utf-8")
    explain, test = [line for line in COMMANDS if "negtome.guard" in line]
    said = run(explain, folder)
    assert (said.returncode, said.stdout.splitlines()[0]) == (3, "steer") and "C1" in said.stdout
    assert run(test, folder).returncode == 0


@pytest.mark.slow
def test_its_script_makes_what_it_says(folder):
    script = "\n".join(text for kind, text in BLOCKS if kind == "python")
    (folder / "script.py").write_text(script, encoding="utf-8")
    done = run("python script.py", folder)
    assert done.returncode == 0, done.stderr
    sites, share = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ attentions in \d+ of 20 steps", sites)
    assert 0 < int(re.fullmatch(r"(\d+)% of the tokens were pushed", share)[1]) <= 100
    grid = np.asarray(Image.open(folder / "birds.png").convert("RGB"), dtype=int)
    alike, apart = grid.reshape(2, 128, 4, 128, 3).transpose(0, 2, 1, 3, 4)
    changed = abs(alike - apart).mean(axis=(1, 2, 3))
    assert changed[0] == 0 and (changed[1:] > 1).all(), "the first stays, the others move"
    assert Image.open(folder / "not_that_panda.png").size == (128, 128)


@pytest.mark.slow
def test_its_sweep_makes_its_table(folder):
    (sweep,) = [line for line in COMMANDS if "experiments reproduce" in line]
    done = run(sweep, folder, f"outputs={folder / 'outputs'}", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert (folder / "outputs" / "results" / "first" / "table.md").is_file()
    table = pd.read_csv(folder / "outputs" / "results" / "first" / "table.csv")
    table = table[table["metric"] == "pairwise_distance"]
    assert sorted(table["alpha"].dropna()) == [0.9, 1.8] and list(table["method"]).count("none") == 1
    assert (table["n_images"] == 2 * 4 * 4).all() and table["difference"].notna().sum() == 2
