"""Hydra parses every file anew in every composition, which takes two fifths of its time: here they are parsed once."""

import functools
import pickle
from pathlib import Path

import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

from experiments.configs import expand


@pytest.fixture(scope="session", autouse=True)
def _files_are_parsed_once():
    Plugins.instance()  # registers the sources
    source = SourcesRegistry.instance().types["file"]
    load = source.load_config

    @functools.cache
    def parsed(provider, path, name, changed):
        return pickle.dumps(load(source(provider, path), name))

    def load_config(self, config_path):
        file = Path(self.path, self._normalize_file_name(config_path))
        if not file.exists():
            return load(self, config_path)  # which says so
        return pickle.loads(parsed(self.provider, self.path, config_path, file.stat().st_mtime_ns))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_config", load_config)
        yield


@pytest.fixture(scope="session")
def with_model():
    """Compose the diversity experiment with a model, once for all tests: `with_model("sdxl")`. Not to be changed."""
    return functools.cache(lambda name: expand(["experiment=diversity", f"model={name}", "method=none"])[0])
