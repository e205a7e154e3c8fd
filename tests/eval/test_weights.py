"""The table of weights, and what is found, downloaded and refused by its rows."""

import importlib
import pkgutil

import pytest

from eval import __path__ as modules
from eval.encoders import Network
from eval.features import EffNetLite0, Inception
from eval.weights import FACTS, WeightsFacts, published_hash


def rows_of(kind):
    """Return the rows of all subclasses of a class."""
    rows = set()
    for subclass in kind.__subclasses__():
        rows |= {getattr(subclass, "ROW", None), *rows_of(subclass)} - {None}
    return rows


def test_every_row_belongs_to_a_network_and_has_its_texts():
    for module in pkgutil.iter_modules(modules):
        importlib.import_module(f"eval.{module.name}")
    assert rows_of(Network) == set(FACTS) - {"none", "pixels"}
    texts = {"source", "resize", "input_range", "licence", "how_to_get"}
    for name, row in FACTS.items():
        assert row.keys() >= texts and row.get("local", {}).keys() <= texts, name


def test_any_file_of_a_url_is_enough_and_all_of_a_repository_are_needed(tmp_path, monkeypatch):
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
    for name in FACTS["dinov2"]["files"]:
        assert not WeightsFacts.find("dinov2", "it", tmp_path, model="a/b").present
        (tmp_path / name).write_bytes(b"weights")
    facts = WeightsFacts.find("dinov2", "it", tmp_path, model="a/b")
    assert facts.files == tuple(tmp_path / name for name in FACTS["dinov2"]["files"])


def test_nothing_is_downloaded_to_a_path_that_the_user_named(tmp_path, monkeypatch):
    addresses = []
    monkeypatch.setattr("eval.weights.network_failure", lambda url: addresses.append(url) or "no network")
    for path, expected in ((tmp_path / "mine", []), (None, [FACTS["sscd"]["url"], None])):
        addresses.clear()
        for facts in (WeightsFacts.find("sscd", "it", path), WeightsFacts.find("dinov2", "it", path, model="a/b")):
            with pytest.raises(FileNotFoundError, match="expected the weights of it") as error:
                facts.fetch()
            assert ("no download" in str(error.value)) == (path is None)
        assert addresses == expected


@pytest.mark.parametrize(("row", "prefix"), [("inception", "6726825d"), ("sscd", "9f26bd4c")])
def test_another_file_under_a_published_name_is_refused(row, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.weights.published_hash", published_hash)
    published, mine = (tmp_path / name for name in (FACTS[row]["files"][0], "mine-20240101.pth"))
    for file in (published, mine):
        file.write_bytes(b"abc")
    assert WeightsFacts.find(row, "it", mine, resize="none").fingerprint.startswith("ba7816bf8f01-")
    with pytest.raises(ValueError, match=f"{prefix}.*got ba7816bf8f01"):
        _ = WeightsFacts.find(row, "it", published, resize="none").fingerprint
    assert EffNetLite0().weights().expected == "57934424" and EffNetLite0().id


def test_a_download_that_failed_is_not_tried_again(tmp_path, monkeypatch):
    attempts = []
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("eval.weights.network_failure", lambda url: attempts.append(url) or "no network")
    messages = set()
    for _ in range(3):
        with pytest.raises(FileNotFoundError, match="expected the weights of Inception") as error:
            Inception().prepare()
        messages.add(str(error.value))
    assert len(attempts) == len(messages) == 1
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / FACTS["inception"]["files"][0]).write_bytes(b"put there by hand")
    assert Inception().id
