"""What docs/extending.md says to add is added to a copy of the checkout, and runs there from images to table."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
#: Which runs the new experiment stands for; those on a tiny checkpoint, to the table; the documentation's own test; and
#: how the new method's picture, which pins its pixels, differs from that without a method, image by image.
SCRIPT = """
import json, sys
import numpy as np
from PIL import Image
from experiments import tabulate
from experiments.compose import expand
from experiments.plan import Plan
from experiments.evaluate import evaluate
from experiments.generate import generate

named = [[cfg.model.name, cfg.method.name] for cfg in expand(["experiment=candidates"])]
plan = Plan.make(json.loads(sys.argv[1]))
generate(plan)
evaluate(plan)
tabulate.write_table(plan)

sys.path.insert(0, "tests/experiments")
import test_conf, test_golden

test_conf.test_the_documentation_names_every_metric()
stock = np.asarray(Image.open("tests/experiments/golden/none-0.png").convert("RGB"))
chosen = test_golden.picture(test_golden.METHODS["farthest_first"]())
apart = [test_golden.difference(stock[:, x : x + 32], chosen[:, x : x + 32]) for x in range(0, 128, 32)]
print(json.dumps([named, apart]))
"""


def sections():
    """Return of every section of the page, by its title, the new files by their paths and the diffs."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        files = dict(re.findall(r"`([\w/.]+)`:\n```(?:python|yaml)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
        diffs = re.findall(r"^```diff\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        assert 2 * (len(files) + len(diffs)) == part.count("\n```"), "a block belongs to no file"
        found[part.partition("\n")[0]] = files, diffs
    return found


def naive_colourfulness(file):
    """Hasler and Suesstrunk (2003), as it is written there, pixel by pixel."""
    rg, yb = [], []
    for r, g, b in np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).tolist():
        rg.append(r - g)
        yb.append(0.5 * (r + g) - b)
    mean_rg, mean_yb = sum(rg) / len(rg), sum(yb) / len(yb)
    variance_rg = sum((value - mean_rg) ** 2 for value in rg) / len(rg)
    variance_yb = sum((value - mean_yb) ** 2 for value in yb) / len(yb)
    return math.sqrt(variance_rg + variance_yb) + 0.3 * math.sqrt(mean_rg**2 + mean_yb**2)


def extend(copy, folder, tiny_overrides):
    """Apply the page's blocks to a copy of the checkout and run them there; return what was printed."""
    for part in ("conf", "docs", "eval", "experiments", "negtome", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("models", "results"):
        (copy / part).symlink_to(ROOT / part)
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    for files, diffs in sections().values():
        for path, text in files.items():
            assert not (copy / path).exists(), path
            (copy / path).write_text(text, encoding="utf-8")
        for diff in diffs:
            subprocess.run(["git", "apply", "-C1"], cwd=copy, env=env, input=diff, text=True, check=True)
    suites = [yaml.safe_load((copy / "conf" / "metric" / f"{name}.yaml").read_text()) for name in ("core", "diversity")]
    unused = {*suites[0], *suites[1]} - {"defaults", "clip_score", "pairwise_distance", "vendi_score", "colourfulness"}
    changes = ["metric=diversity", *(f"~metric.{name}" for name in unused)]
    overrides = [one for one in tiny_overrides("candidates", folder, *changes) if not one.startswith("method.")]
    overrides += ["method=none,farthest_first", "method.candidates=3"]
    command = [sys.executable, "-c", SCRIPT, json.dumps(overrides)]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_example_touches_more_than_three_files():
    touched = {
        title: [*files, *(path for diff in diffs for path in re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE))]
        for title, (files, diffs) in sections().items()
    }
    assert {title: len(set(paths)) for title, paths in touched.items()} == {
        "A method": 3, "A metric": 3, "An experiment": 1, "An architecture": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_added_runs_and_stands_in_the_table(tmp_path, tiny_overrides):
    """In one test: two would extend the checkout twice, where they are given to two processes."""
    folder = tmp_path / "extended"
    named, apart = extend(tmp_path / "checkout", folder, tiny_overrides)
    models, names = ("mini-sdxl", "mini-flux"), ("none", "negtome", "farthest_first")
    assert named == [[model, method] for model in models for method in names]
    first, second, third, fourth = apart  # two images of both mini models, and their first is that without a method
    assert max(first, third) < 1 and min(second, fourth) > 2, "the first is off by rounding at most"
    frame = pd.read_csv(folder / "results" / "candidates" / "table.csv").set_index(["method", "metric"])
    assert (frame.loc["farthest_first", "candidates"] == 3).all() and frame.loc["none", "candidates"].isna().all()
    values, images = {}, {}
    for method in ("none", "farthest_first"):
        row = frame.loc[(method, "colourfulness")]
        run = folder / "outputs" / "runs" / row["run_id"]
        files = sorted(run.glob("images/*/*/*.png"))
        assert len(files) == row["n_images"] == 4
        values[method] = sum(map(naive_colourfulness, files)) / 4  # two groups of two
        assert row["value"] == pytest.approx(values[method], rel=1e-5), "six digits"
        assert row["encoder"] == "pixels" and pd.isna(row["higher_is_better"])
        images[method] = {file.relative_to(run).as_posix(): file.read_bytes() for file in files}
    gained = frame.loc[("farthest_first", "colourfulness"), "difference"]
    assert gained == pytest.approx(values["farthest_first"] - values["none"], rel=1e-4)
    # Every group keeps its first image, and the other is farther from it than without the method, or the same.
    same = {name for name, content in images["none"].items() if images["farthest_first"][name] == content}
    assert {name for name in images["none"] if name.endswith("00.png")} <= same < set(images["none"])
    assert frame.loc[("farthest_first", "pairwise_distance"), "difference"] > 0
