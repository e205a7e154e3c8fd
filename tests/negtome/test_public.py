"""What a user's editor and type checker see of the package."""

import inspect
import tomllib
import typing
from pathlib import Path

import negtome
from negtome import config, merge, reference


def test_what_is_public_is_said_to_be():
    own = {name for name, value in vars(negtome).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(negtome.__all__) == own


def test_no_public_name_is_that_of_a_module_too():
    assert not set(negtome.__all__) & {path.stem for path in Path(negtome.__file__).parent.glob("*.py")}


def test_types_are_told_and_shipped():
    assert (Path(negtome.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["negtome"]


def test_modes_are_literals_of_what_is_accepted():
    for owner, name, accepted in (
        (negtome.NegToMeConfig, "matching", merge.MATCHINGS),
        (negtome.NegToMeConfig, "reference", merge.REFERENCES),
        (negtome.Reference, "posterior", reference.POSTERIORS),
        (negtome.negative_merge, "matching", merge.MATCHINGS),
    ):
        assert typing.get_args(typing.get_type_hints(owner)[name]) == accepted
    hints = typing.get_type_hints(negtome.NegToMeConfig.preset)
    named = {(a, v) for a in typing.get_args(hints["architecture"]) for v in typing.get_args(hints["variant"])}
    assert named == set(config._PRESETS)
