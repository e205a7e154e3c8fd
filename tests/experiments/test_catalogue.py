"""Titles, colours and columns of methods for tables and figures come from their classes and files."""

import pytest

from experiments import PROJECT
from experiments.methods.setting import Setting
from experiments.runs import catalogue


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A folder of methods: `conf("mine", "name: mine")` adds one."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "PROJECT", tmp_path)
    catalogue.entries.cache_clear()

    def add(name, *lines):
        (tmp_path / "conf" / "method" / f"{name}.yaml").write_text("\n".join([f"name: {name}", *lines]))

    yield add
    catalogue.entries.cache_clear()


def test_every_method_of_the_project_has_its_own_title():
    titles = {name: entry.title for name, entry in catalogue.entries().items()}
    assert set(titles) == {file.stem for file in (PROJECT / "conf" / "method").glob("*.yaml")}
    assert len(set(titles.values())) == len(titles)


def test_a_file_overrides_its_class_and_its_base(conf):
    conf("first", "_target_: experiments.methods.negtome.NegToMe", "metadata: {title: a title, colour: sky}")
    conf("second", "defaults: [first, other@methods.other]")
    entries = {name: (entry.title, entry.colour) for name, entry in catalogue.entries().items()}
    assert entries == {"first": ("a title", "sky"), "second": ("NegToMe", None)}
    assert [setting.name for setting in catalogue.settings("second")][2:4] == ["alpha", "threshold"]
    assert catalogue.settings() == catalogue.settings("first") and catalogue.settings("unknown") == ()


def test_an_unknown_colour_is_named(conf):
    conf("mine", "_target_: experiments.methods.method.Baseline", "metadata: {colour: pink}")
    with pytest.raises(ValueError, match=r"expected one of black, .*mine\.yaml, got 'pink'"):
        catalogue.entries()


def test_a_setting_is_cells_and_a_text():
    one, several, both = Setting("a_b"), Setting("sites"), Setting("span", ("low", "high"))
    assert (one.heading, one.cells({"a_b": 2}), one.cells({})) == ("a b", {"a_b": 2}, {"a_b": None})
    assert several.cells({"sites": ["x", "y"]}) == {"sites": "x+y"} and several.cells({"sites": []}) == {"sites": None}
    assert both.cells({"span": [1, 2]}) == {"low": 1, "high": 2} and both.cells({}) == {"low": None, "high": None}
    assert (one.text({"a_b": 0.5}), one.text({"a_b": "x"}), one.text({"a_b": float("nan")})) == ("0.5", "x", "")
    assert both.text({"low": 700.0, "high": 1000.0}) == "1000 to 700"
