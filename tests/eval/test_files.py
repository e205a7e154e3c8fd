"""Hashes that follow a file's content, and writing in one step."""

import os

import pytest

from eval.files import canonical_json, content_hash, remembered_hash, write_json


def test_hashes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # the first test vector of FIPS 180-2
    assert content_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hashes_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("eval.files.content_hash", lambda path: read.append(path) or content_hash(path))
    image = tmp_path / "image.png"
    image.write_bytes(b"pixels")
    digest = content_hash(image)
    # just written: it may be written again within the same tick of the clock
    assert remembered_hash(image) == remembered_hash(image) == digest and len(read) == 2
    monkeypatch.setattr("eval.files.SETTLED", 0)
    assert remembered_hash(image) == remembered_hash(image) == digest and len(read) == 3
    # other content of the same size and with the same time
    before = os.stat(image)
    image.write_bytes(image.read_bytes()[::-1])
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert remembered_hash(image) == content_hash(image) != digest


def test_equal_documents_are_equal_text():
    assert canonical_json({"b": [1, 2.0], "a": "é"}) == '{"a": "é", "b": [1, 2.0]}'
    assert canonical_json({"b": [1, 2.0], "a": "é"}, compact=True) == r'{"a":"\u00e9","b":[1,2.0]}'


def test_text_is_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "document.json"
    write_json(path, {"b": 1, "a": "é"})
    before = path.read_bytes()
    assert before.decode() == '{\n "a": "é",\n "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
