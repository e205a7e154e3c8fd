"""Configurations and runs that several tests read."""

import functools
import shutil

import pytest
from plans import plan_from, plan_of

from experiments.compose import first
from experiments.evaluate import evaluate
from experiments.generate import generate


@pytest.fixture(scope="session")
def with_model():
    """Compose the diversity experiment with a model, once for all tests: `with_model("sdxl")`. Not to be changed."""
    return functools.cache(lambda name: first(["experiment=diversity", f"model={name}", "method=none"]))


@pytest.fixture(scope="session")
def scored_sweep(tmp_path_factory, tiny_overrides):
    """Two scored runs of an experiment: the plan, outputs, and folders of none and negtome. Not to be changed."""
    folder = tmp_path_factory.mktemp("scored")
    plan = plan_of(tiny_overrides("sweep", folder, "method=none,negtome"))
    folders = generate(plan)
    evaluate(plan)
    return plan, folder / "outputs", folders


@pytest.fixture
def scored_copy(scored_sweep, tmp_path):
    """A copy of `scored_sweep` that a test may change."""
    plan, outputs, folders = scored_sweep
    shutil.copytree(outputs, tmp_path / "outputs")
    configs = [spec.cfg.copy() for spec in plan.runs]
    for cfg in configs:
        cfg.outputs, cfg.results = str(tmp_path / "outputs"), str(tmp_path / "results")
    return plan_from(*configs), tmp_path / "outputs", [tmp_path / "outputs" / f.relative_to(outputs) for f in folders]
