"""What a user's editor and type checker see of the package."""

import ast
import importlib
import pickle
from pathlib import Path

import pytest

import negtome


def test_type_checkers_and_python_see_the_same_names():
    (seen,) = (node for node in ast.parse(Path(negtome.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: node.module for node in imports for alias in node.names}
    assert set(names) == set(negtome.__all__)
    for name, module in names.items():
        assert getattr(negtome, name) is getattr(importlib.import_module(module), name)


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="module 'negtome' has no attribute 'attatch'"):
        negtome.attatch  # noqa: B018  (asking is the test)
    with pytest.raises(ImportError):
        from negtome import attatch  # noqa: F401


def test_public_names_can_be_pickled():
    settings = negtome.NegToMeConfig(alpha=1.5)
    assert pickle.loads(pickle.dumps(settings)) == settings
    for name in negtome.__all__:
        value = getattr(negtome, name)
        assert pickle.loads(pickle.dumps(value)) is value
