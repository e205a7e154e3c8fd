"""The hash chain of an audit file: what breaks it, what it cannot see, several processes, and files without one."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import PROJECT
from negtome.guard import Audit
from negtome.guard.__main__ import main
from negtome.guard.audit import START, check_chain

#: Number of records in a file that is attacked.
COUNT = 7


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """The lines of a file of `COUNT` records."""
    file = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    for number in range(COUNT):
        Audit(file).record({"event": number})
    return file.read_bytes().splitlines(keepends=True)


def edited(lines, index):
    return [*lines[:index], lines[index].replace(b'"event": ', b'"event": 1'), *lines[index + 1 :]]


ATTACKS = {
    "edited": (edited, range(COUNT - 1)),
    "removed": (lambda lines, i: lines[:i] + lines[i + 1 :], range(COUNT - 1)),
    "inserted": (lambda lines, i: [*lines[: i + 1], lines[i], *lines[i + 1 :]], range(COUNT)),
    "reordered": (lambda lines, i: [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]], range(COUNT - 1)),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_the_first_break_is_named_with_its_line_and_kind(kind, chained, tmp_path):
    attack, places = ATTACKS[kind]
    file = tmp_path / "audit.jsonl"
    for index in places:
        file.write_bytes(b"".join(attack(chained, index)))
        fault = check_chain(file).fault
        line = index + 2 if kind == "inserted" else index + 1
        assert kind in fault and f"line {line}" in fault, (index, fault)


@given(st.permutations(range(COUNT)), st.integers(0, COUNT))
def test_no_other_order_or_choice_of_records_is_intact_but_a_beginning(chained, tmp_path_factory, order, count):
    kept = list(order)[:count]
    file = tmp_path_factory.getbasetemp() / "chosen.jsonl"
    file.write_bytes(b"".join(chained[index] for index in kept))
    assert bool(check_chain(file).fault) == (kept != list(range(count)))


@given(st.integers(0, COUNT - 2), st.data())
def test_any_changed_byte_before_the_last_line_breaks_the_chain(chained, tmp_path_factory, index, data):
    # Without its newline, the last line but one is a part of the last, whose edits the chain alone does not show.
    last = len(chained[index]) - (2 if index == COUNT - 2 else 1)
    place = data.draw(st.integers(0, last))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != chained[index][place]))
    line = chained[index][:place] + bytes([byte]) + chained[index][place + 1 :]
    file = tmp_path_factory.getbasetemp() / "changed.jsonl"
    file.write_bytes(b"".join([*chained[:index], line, *chained[index + 1 :]]))
    assert check_chain(file).fault


def test_a_cut_or_edited_end_is_seen_by_an_earlier_head_alone(chained, tmp_path):
    file = tmp_path / "audit.jsonl"
    file.write_bytes(b"".join(chained))
    head = check_chain(file).head
    for lines in (chained[:-1], edited(chained, COUNT - 1)):
        file.write_bytes(b"".join(lines))
        assert not check_chain(file).fault and "cut off" in check_chain(file, head).fault
    file.write_bytes(b"".join(chained))
    Audit(file).record({"event": "later"})
    assert not check_chain(file, head).fault and check_chain(file).head != head


@pytest.mark.parametrize("size", [1, 70_000])  # more than is read at once
def test_a_chain_starts_after_the_records_of_an_earlier_version(tmp_path, size):
    file = tmp_path / "audit.jsonl"
    file.write_text(json.dumps({"action": "allow", "text": "x" * size}) + "\n" + '{"action": "refuse"}\n')
    for number in range(3):
        Audit(file).record({"event": number, "text": "x" * size})
    report = check_chain(file)
    assert (report.unchained, report.records, report.fault) == (2, 3, "")
    assert [json.loads(line).get("number") for line in file.read_text().splitlines()] == [None, None, 3, 4, 5]
    file.write_bytes(file.read_bytes().replace(b'"refuse"', b'"allow"'))
    assert "edited" in check_chain(file).fault  # the last one is covered


def test_an_unchained_record_after_the_start_of_the_chain_is_a_break(tmp_path):
    file = tmp_path / "audit.jsonl"
    Audit(file).record({"event": 1})
    with file.open("a") as other:
        other.write('{"action": "allow"}\n')
    assert "line 2 was inserted" in check_chain(file).fault


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=20).filter(lambda cut: b"\n" not in cut)), max_size=8)
)
def test_unfinished_lines_of_killed_processes_stay_and_do_not_break_the_chain(tmp_path_factory, steps):
    file = tmp_path_factory.mktemp("killed") / "audit.jsonl"
    Audit(file).record({"event": "first"})
    half = 0
    for cut in steps:
        if cut is None:
            Audit(file).record({"event": "next"})
        else:
            with file.open("ab") as other:
                other.write(b'{"half' + cut)
    Audit(file).record({"event": "last"})
    report = check_chain(file)
    half = len(file.read_bytes().splitlines()) - report.records if b"\r" not in b"".join(filter(None, steps)) else half
    assert report.records == 2 + steps.count(None) and not report.fault
    assert report.unfinished >= half


def test_several_processes_continue_one_chain(tmp_path):
    code = """
import sys
from negtome.guard import Audit
for number in range(20):
    Audit(sys.argv[1]).record({"event": number, "text": "x" * 3000})
"""
    file = tmp_path / "audit.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, file], cwd=PROJECT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    report = check_chain(file)
    assert (report.records, report.unfinished, report.fault) == (60, 0, "")


def test_the_command_prints_the_head_and_exits_by_the_chain(chained, tmp_path, capsys):
    file = tmp_path / "audit.jsonl"
    file.write_bytes(b"".join(chained))
    assert main(["audit", str(file)]) == 0
    head = check_chain(file).head
    assert head in capsys.readouterr().out
    assert main(["audit", str(file), "--head", head]) == 0
    assert main(["audit", str(file), "--head", START.replace("0", "1")]) == 1
    file.write_bytes(b"".join(edited(chained, 2)))
    assert main(["audit", str(file)]) == 1 and "line 3 was edited" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "absent")]) == 2
    file.write_bytes(b"")
    assert main(["audit", str(file)]) == 0
