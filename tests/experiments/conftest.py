"""Configurations that several tests read."""

import functools

import pytest

from experiments.plan import composed


@pytest.fixture(scope="session")
def with_model():
    """Compose the diversity experiment with a model, once for all tests: `with_model("sdxl")`. Not to be changed."""
    return functools.cache(lambda name: composed(["experiment=diversity", f"model={name}", "method=none"]))
