"""The queue of escalated requests: decided once, by a person, each step on record."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from negtome.guard.__main__ import main
from negtome.guard.audit import check_chain, text_sha256
from negtome.guard.queue import Queue, QueueFullError, new_ticket


def ticket(prompt="a police officer"):
    return new_ticket(
        text_sha256(prompt), {"prompt": prompt, "images": 1}, "p" * 64, "keyword", "escalate", ["C3"], "why"
    )


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "queue")


def test_a_request_is_decided_once_and_released_after_it_was_allowed(queue):
    added = queue.add(ticket())
    with pytest.raises(ValueError, match="only an allowed request"):
        queue.release(added.id)
    assert queue.decide(added.id, "allow", " Ann\n").by == "Ann"
    for decision in ("allow", "refuse"):
        with pytest.raises(ValueError, match="decided once"):
            queue.decide(added.id, decision, "Bob")
    assert queue.release(added.id).state == "released"
    with pytest.raises(ValueError, match="only an allowed request"):
        queue.release(added.id)
    assert queue.find(added.request_sha256) == queue.get(added.id) == queue.add(ticket())
    steps = [json.loads(line) for line in queue.audit.path.read_text().splitlines()]
    assert [(step["step"], step["by"]) for step in steps] == [("queued", ""), ("allowed", "Ann"), ("released", "Ann")]
    assert not check_chain(queue.audit.path).fault


def test_a_refused_request_is_never_released(queue):
    added = queue.add(ticket())
    queue.decide(added.id, "refuse", "Ann")
    with pytest.raises(ValueError, match="refused"):
        queue.release(added.id)
    assert [one.state for one in queue.tickets()] == ["refused"] and queue.tickets("open") == []


def test_of_many_who_decide_at_once_one_does(queue):
    added = queue.add(ticket())

    def decide(number):
        try:
            return Queue(queue.folder).decide(added.id, "allow" if number % 2 else "refuse", f"person {number}").by
        except ValueError:
            return None

    with ThreadPoolExecutor(4) as pool:
        deciders = [name for name in pool.map(decide, range(8)) if name]
    assert deciders == [queue.get(added.id).by]


def test_a_step_that_cannot_be_recorded_does_not_happen(queue, monkeypatch):
    added = queue.add(ticket())

    def fail(fields):
        raise OSError("the disk is full")

    monkeypatch.setattr(queue.audit, "record", fail)
    with pytest.raises(OSError, match="full"):
        queue.decide(added.id, "allow", "Ann")
    assert queue.get(added.id).state == "open"


def test_a_full_queue_takes_no_more_until_one_is_decided(tmp_path):
    queue = Queue(tmp_path / "queue", limit=2)
    first, _ = queue.add(ticket("1")), queue.add(ticket("2"))
    with pytest.raises(QueueFullError):
        queue.add(ticket("3"))
    queue.decide(first.id, "refuse", "Ann")
    queue.add(ticket("3"))


def test_the_folder_and_its_files_are_their_owners(queue):
    added = queue.add(ticket())
    assert stat.S_IMODE(queue.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((queue.folder / f"{added.id}.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-5],
        lambda text: text.replace('"open"', '"freed"'),
        lambda text: "[]",
        lambda text: text.replace('"request_sha256": "', '"request_sha256": "0'),
        lambda text: text.replace('"by"', '"bye"'),
    ],
)
def test_a_damaged_ticket_is_an_error_and_no_permission(queue, damage):
    added = queue.add(ticket())
    file = queue.folder / f"{added.id}.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match="damaged"):
        queue.find(added.request_sha256)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "0" * 15, "G" * 16, "0" * 16])
def test_an_id_that_is_none_names_no_file(queue, name):
    queue.add(ticket())
    with pytest.raises(ValueError, match=r"id has 16|no ticket"):
        queue.get(name)


def test_the_commands_list_decide_and_release(queue, capsys):
    added = queue.add(ticket("a police officer\x1b[2J"))
    folder = str(queue.folder)
    assert main(["queue", folder, "list"]) == 0
    listed = capsys.readouterr().out
    assert added.id in listed and "\x1b" not in listed
    assert main(["queue", folder, "release", added.id]) == 2
    assert main(["queue", folder, "decide", added.id, "allow", "--by", " "]) == 2
    assert main(["queue", folder, "decide", added.id, "allow", "--by", "Ann"]) == 0
    assert main(["queue", folder, "release", added.id]) == 0
    assert main(["queue", folder, "list", "--state", "open"]) == 0
    assert queue.get(added.id).state == "released" and capsys.readouterr().out.endswith("0 requests\n")
    assert main(["queue", f"{folder}-absent", "list"]) == main(["queue", f"{folder}-absent", "release", added.id]) == 2
