"""Hydra parses every file anew in every composition, which takes two fifths of its time: here they are parsed once."""

import functools
import pickle
from pathlib import Path

import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

from experiments.configs import expand


def _changed(source, name):
    file = Path(source.path, source._normalize_file_name(name))
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.fixture(scope="session", autouse=True)
def _files_are_parsed_once():
    Plugins.instance()  # registers the sources
    sources = SourcesRegistry.instance().types

    def keep(source, version):
        load = source.load_config

        @functools.cache
        def parsed(provider, path, name, version):
            return pickle.dumps(load(source(provider, f"{source.scheme()}://{path}"), name))

        def load_config(self, config_path):
            return pickle.loads(parsed(self.provider, self.path, config_path, version(self, config_path)))

        patch.setattr(source, "load_config", load_config)

    with pytest.MonkeyPatch.context() as patch:
        keep(sources["file"], _changed)
        keep(sources["pkg"], lambda *_: None)  # Hydra's own
        yield


@pytest.fixture(scope="session")
def with_model():
    """Compose the diversity experiment with a model, once for all tests: `with_model("sdxl")`. Not to be changed."""
    return functools.cache(lambda name: expand(["experiment=diversity", f"model={name}", "method=none"])[0])
