"""The table of weights, and what is found, fetched and said by its rows."""

import importlib
import pkgutil

import pytest

from eval import __path__ as places
from eval.encoders import Network
from eval.features import EffNetLite0, Inception
from eval.weights import FACTS, WeightsFacts, published_hash

TEXTS = {"source", "resize", "input_range", "licence", "how_to_get"}


def with_rows(kind):
    """Return the rows of a class's subclasses, theirs included."""
    return {
        row
        for each in kind.__subclasses__()
        for row in {*([each.ROW] if hasattr(each, "ROW") else []), *with_rows(each)}
    }


def test_every_row_is_some_networks_and_has_its_texts():
    for module in pkgutil.iter_modules(places):
        importlib.import_module(f"eval.{module.name}")
    assert with_rows(Network) == set(FACTS) - {"none", "pixels"}
    for name, row in FACTS.items():
        assert row.keys() >= TEXTS, name
        assert row.get("local", {}).keys() <= TEXTS, name


def test_any_of_a_rows_files_will_do_and_a_named_place_is_the_only_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    names = FACTS["inception"]["files"]
    files = tuple(tmp_path / "checkpoints" / name for name in names)
    facts = WeightsFacts.find("inception", "it", resize="none")
    assert not facts.present and facts.looked_in == files and facts.source == names[0] and facts.url
    files[1].parent.mkdir()
    files[1].write_bytes(b"weights")
    facts = WeightsFacts.find("inception", "it", resize="none")
    assert facts.files == (files[1],) and facts.source == names[1]
    named = WeightsFacts.find("inception", "it", tmp_path / "mine.pth", resize="none")
    assert not named.present and named.looked_in == (tmp_path / "mine.pth",)


def test_all_of_a_repositorys_files_are_needed(tmp_path):
    for name in FACTS["dinov2"]["files"]:
        facts = WeightsFacts.find("dinov2", "it", tmp_path, model="a/b")
        assert not facts.present
        (tmp_path / name).write_bytes(b"weights")
    facts = WeightsFacts.find("dinov2", "it", tmp_path, model="a/b")
    assert facts.files == tuple(tmp_path / name for name in FACTS["dinov2"]["files"])


def test_nothing_is_downloaded_to_a_place_that_was_named(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("eval.weights.network_answers", lambda url: asked.append(url) or False)
    for given, rows in ((tmp_path / "mine", []), (None, [FACTS["sscd"]["url"], None])):
        asked.clear()
        for facts in (WeightsFacts.find("sscd", "it", given), WeightsFacts.find("dinov2", "it", given, model="a/b")):
            with pytest.raises(FileNotFoundError, match="expected the weights of it") as error:
                facts.fetch()
            assert ("no download" in str(error.value)) == (given is None)
        assert asked == rows


@pytest.mark.parametrize(("row", "begin"), [("inception", "6726825d"), ("sscd", "9f26bd4c")])
def test_another_file_under_a_published_name_is_refused(row, begin, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.weights.published_hash", published_hash)
    published, mine = (tmp_path / name for name in (FACTS[row]["files"][0], "mine-20240101.pth"))
    for file in (published, mine):
        file.write_bytes(b"abc")
    assert WeightsFacts.find(row, "it", mine, resize="none").fingerprint.startswith("ba7816bf8f01-")
    with pytest.raises(ValueError, match=f"{begin}.*got ba7816bf8f01"):
        _ = WeightsFacts.find(row, "it", published, resize="none").fingerprint


def test_the_shipped_weights_are_those_of_their_name(monkeypatch):
    monkeypatch.setattr("eval.weights.published_hash", published_hash)
    assert EffNetLite0().weights().expected == "57934424" and EffNetLite0().id


def test_a_fetch_that_failed_is_not_tried_again(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("eval.weights.network_answers", lambda url: tried.append(url) or False)
    said = set()
    for _ in range(3):
        with pytest.raises(FileNotFoundError, match="expected the weights of Inception") as error:
            Inception().prepare()
        said.add(str(error.value))
    assert len(tried) == len(said) == 1
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / FACTS["inception"]["files"][0]).write_bytes(b"put there by hand")
    assert Inception().id
