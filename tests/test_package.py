"""What is uploaded: the wheel holds the library alone and works by itself, the source archive is enough to build it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import negtome

pytest.importorskip("build")
ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
#: With a tiny pipeline of the tests, in an environment that has the wheel: what it is, and that it does something.
SCRIPT = """
import sys
from runpy import run_path
import negtome

print(negtome.__file__)
pipe = run_path(sys.argv[1])["_build_sdxl"]()
config = negtome.NegToMeConfig(threshold=-1, timestep_range=(0, 1000), min_side=4)
with negtome.attach(pipe, config) as attached:
    pipe("a dog", num_images_per_prompt=2, num_inference_steps=2, height=32, width=32)
print(attached.summary()["tokens_pushed"])
"""
pytestmark = pytest.mark.slow


def run(*command, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of a copy of the checkout, and the wheel that is built from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "checkout", ignore=LEFT_OUT)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    done = run(*command, cwd=folder / "checkout")
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    return source, wheel


@pytest.fixture(scope="module")
def python(archives, tmp_path_factory):
    """The interpreter of an environment with the wheel, and its needs by the path of this one's packages."""
    folder = tmp_path_factory.mktemp("installed")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    target = folder / "bin" / "python"
    command = (sys.executable, "-m", "pip", "--python", target, "install", "--no-deps", "--no-index", archives[1])
    done = run(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_holds_the_library_and_nothing_else(archives):
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "negtome").rglob("*") if path.is_file()}
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == {name for name in own if "__pycache__" not in name} and "negtome/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in about)


def test_the_source_archive_has_what_the_wheel_is_made_of_and_no_models_or_results(archives):
    with tarfile.open(archives[0]) as source:
        top = {Path(name).parts[1] for name in source.getnames() if len(Path(name).parts) > 1}
    texts = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md"}
    assert top == {*texts, "PKG-INFO", "negtome", "negtome.egg-info", "pyproject.toml", "setup.cfg"}
    assert archives[0].stat().st_size < 1 << 20


def test_both_are_as_an_index_takes_them(archives):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_wheel_works_without_the_checkout(python, tmp_path):
    done = run(python, "-c", SCRIPT, ROOT / "tests" / "conftest.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, pushed = done.stdout.splitlines()
    assert Path(file).is_relative_to(python.parents[1]) and int(pushed) > 0
    policy = ROOT / "conf" / "safety" / "policy.yaml"
    guard = ("-m", "negtome.guard", "explain", "--policy", policy, "--guard", "keyword", "a vampire")
    said = run(python, *guard, cwd=tmp_path)
    assert (said.returncode, said.stdout.splitlines()[0]) == (3, "steer")


def test_its_commands_are_installed_and_say_what_they_do(python, tmp_path):
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name="negtome", path=[str(packages)])
    assert found.version == negtome.__version__
    for script in found.entry_points.select(group="console_scripts"):
        done = run(python.parent / script.name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and script.name in done.stdout, done.stderr
