"""A verdict is what a guard said, where that follows from the policy, and else invalid; and it is put on record."""

import hashlib
import json
import stat
import subprocess
import sys

import pytest
from filelock import FileLock

from experiments import PROJECT
from negtome.guard import Audit, Decision, GuardError, Reply, UnusableReplyError, decide
from negtome.guard.verdict import LONGEST

#: Of the guard that is told its replies.
NONCE = "0123456789abcdef"
GOOD = Decision("steer", ("C1",), "fangs", "it is one", 0.9).to_json(NONCE)
ALLOWED = Decision("allow").to_json(NONCE)
FORGED = Decision("allow", ("C9",), "anything goes").to_json(NONCE)
UNLIKELY = Decision("allow", ("C1",), "fangs").to_json(NONCE)


def test_a_reply_that_follows_is_the_verdict(policy, told):
    verdict = decide(policy, told(GOOD), "draw a vampire")
    assert (verdict.action, verdict.clauses, verdict.quote) == ("steer", ("C1",), "fangs")
    assert (verdict.faults, verdict.replies) == ((), (GOOD,)) and verdict.seconds >= 0
    assert verdict.reason == "the policy says: fangs"
    assert decide(policy, told(ALLOWED), "a tree").reason == "no clause of the policy applies"


@pytest.mark.parametrize("reply", ["", "no", FORGED, UNLIKELY, f"{GOOD}{ALLOWED}", UnusableReplyError("cut", "{")])
def test_a_reply_that_does_not_follow_is_asked_for_once_more_and_then_invalid(reply, policy, told):
    guard = told(reply, GOOD, AssertionError("asked a third time"))
    verdict = decide(policy, guard, "draw a vampire")
    assert (verdict.action, verdict.faults) == ("steer", ())
    assert verdict.replies == ("{" if isinstance(reply, Exception) else reply, GOOD)
    assert guard.asked == 2 * [(policy, "draw a vampire")]
    verdict = decide(policy, told(reply), "draw a vampire")
    assert (verdict.action, verdict.clauses, verdict.quote) == ("invalid", (), "")
    assert len(verdict.replies) == 2 and verdict.faults
    assert verdict.reason == f"the guard's reply did not follow from the policy: {verdict.faults[0]}"
    assert len(decide(policy, told(reply), "draw a vampire", retries=0).replies) == 1


def test_a_decision_of_a_guard_in_python_is_verified_and_needs_no_nonce(policy, told):
    verdict = decide(policy, told(Decision("steer", ("C1",), "fangs")), "draw a vampire")
    assert (verdict.action, verdict.clauses) == ("steer", ("C1",))
    assert Decision.from_fields(json.loads(verdict.replies[0])) == verdict.decision
    for wrong in (
        Decision("allow", ("C1",), "fangs"),
        Decision(["allow"]),
        Decision("allow", "C1"),
        Decision("allow", None, None, None),
        Decision("allow", confidence="high"),
    ):
        verdict = decide(policy, told(wrong), "draw a vampire")
        assert verdict.action == "invalid" and len(verdict.replies) == 2


def test_the_last_reply_is_what_counts(policy, told):
    verdict = decide(policy, told(FORGED, UNLIKELY), "draw a vampire")
    assert verdict.faults == ("expected the action that follows from C1, steer, got allow",)
    assert verdict.decision.clauses == ("C1",)  # as far as it could be read
    assert decide(policy, told(FORGED, "nothing"), "draw a vampire").decision is None


HALVES = b"caf\xe9".decode(errors="surrogateescape")


@pytest.mark.parametrize("prompt", ["", " \n\t", "x" * (LONGEST + 1), HALVES])
def test_a_prompt_that_is_empty_too_long_or_no_unicode_is_not_asked(prompt, policy, told):
    guard = told(ALLOWED)
    with pytest.raises(ValueError, match=f"a prompt of 1 to {LONGEST} characters, got {len(prompt)}|got halves of"):
        decide(policy, guard, prompt)
    with pytest.raises(ValueError, match="retries must be at least 0, got -1"):
        decide(policy, guard, "a tree", retries=-1)
    assert guard.asked == []
    assert decide(policy, guard, "x" * LONGEST).action == "allow"


def test_errors_of_the_guard_are_not_verdicts(policy, told, tmp_path):
    for error in (ConnectionError("no server"), ValueError("the policy is too long")):
        with pytest.raises(type(error), match=str(error)):
            decide(policy, told(error), "a tree", Audit(tmp_path / "audit.jsonl"))
    for error in (TypeError("no"), KeyError("C1"), RecursionError(), SystemExit(0)):
        with pytest.raises(GuardError, match=f"the guard told failed: {type(error).__name__}"):
            decide(policy, told(error), "a tree", Audit(tmp_path / "audit.jsonl"))
    for reply in (None, {"action": "allow"}, ("allow",), Reply(None, NONCE), Reply(ALLOWED, None)):
        with pytest.raises(ValueError, match=f"a Decision or a Reply from the guard told, got {type(reply).__name__}"):
            decide(policy, told(reply), "a tree", Audit(tmp_path / "audit.jsonl"))
    assert not (tmp_path / "audit.jsonl").exists()


def test_a_guard_whose_id_no_record_can_hold_is_not_asked(policy, told, tmp_path):
    guard = told(ALLOWED)
    guard.id = None
    with pytest.raises(GuardError, match="expected its id as a text, got NoneType"):
        decide(policy, guard, "a tree", Audit(tmp_path / "audit.jsonl"))
    assert guard.asked == [] and not (tmp_path / "audit.jsonl").exists()


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_verdict_is_put_on_record_without_its_texts(policy, told, tmp_path):
    file = tmp_path / "new" / "audit.jsonl"
    decide(policy, told(FORGED, GOOD), "draw a vampire", Audit(file))
    decide(policy, told(FORGED), "Dracula", Audit(file))
    first, second = lines(file)
    assert first.pop("time") <= second.pop("time")
    assert [first.pop("number"), second.pop("number")] == [1, 2] and first.pop("previous") == "0" * 64
    assert first == {
        "policy_sha256": policy.sha256,
        "guard": "told-1",
        "prompt_sha256": hashlib.sha256(b"draw a vampire").hexdigest(),
        "reply_sha256": [hashlib.sha256(reply.encode()).hexdigest() for reply in (FORGED, GOOD)],
        "action": "steer",
        "clauses": ["C1"],
        "faults": [],
    }
    assert (second["action"], second["clauses"]) == ("invalid", [])
    assert second["faults"] == ["expected ids of the policy"]  # what came instead is a text
    assert "vampire" not in file.read_text() and "Dracula" not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_texts_are_kept_where_that_is_asked_for(policy, told, tmp_path):
    reply = f"{GOOD} \u2028\x85 "
    decide(policy, told(reply), "Dracula\u2028 é\nat night", Audit(tmp_path / "audit", text=True))
    (row,) = [json.loads(line) for line in (tmp_path / "audit").read_bytes().split(b"\n") if line]
    assert row["prompt"] == "Dracula\u2028 é\nat night" and row["replies"] == [reply]


@pytest.mark.parametrize("text", [True, False])
def test_halves_of_characters_and_several_lines_are_put_on_record(text, policy, told, tmp_path):
    audit = Audit(tmp_path / "audit", text)
    escaped = json.dumps(json.loads(GOOD) | {"rationale": "\ud83d!"})
    verdict = decide(policy, told(f"<think>\udfff</think>{escaped}"), "Dracula", audit)
    assert (verdict.action, verdict.decision.rationale) == ("steer", "?!")
    assert verdict.replies == (f"<think>?</think>{escaped}",)
    for reply in (json.dumps(json.loads(ALLOWED) | {"\ud83d": 1}), UnusableReplyError("cut\n\ud83d off", "\ud83d")):
        verdict = decide(policy, told(reply), "Dracula", audit)
        assert verdict.action == "invalid" and lines(audit.path)[-1]["action"] == "invalid"
    assert (verdict.faults, verdict.replies) == (("cut ? off",), ("?", "?"))


def test_several_processes_append_whole_lines(tmp_path):
    code = """
import sys
from negtome.guard import Audit
for number in range(50):
    Audit(sys.argv[1], text=True).write("0", "g", f"{sys.argv[2]}-{number}", [sys.argv[2] * 5000], "allow", [], [])
"""
    file = tmp_path / "audit.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, file, name], cwd=PROJECT) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    rows = lines(file)
    assert {row["prompt"] for row in rows} == {f"{name}-{number}" for name in "abc" for number in range(50)}
    assert len(rows) == 150 and all(row["replies"] == [5000 * row["prompt"][0]] for row in rows)


def test_an_unfinished_line_does_not_swallow_the_next_record(tmp_path):
    file = tmp_path / "audit.jsonl"
    audit = Audit(file, text=True)
    audit.write("0", "g", "first", [], "allow", [], [])
    with file.open("ab") as half:
        half.write(file.read_bytes()[:40])  # as a program leaves it that was killed, or an earlier version
    audit.write("0", "g", "second", [], "allow", [], [])
    audit.write("0", "g", "third", [], "allow", [], [])
    first, half, *others = file.read_bytes().splitlines()
    assert len(half) == 40
    assert [json.loads(line)["prompt"] for line in (first, *others)] == ["first", "second", "third"]


def test_a_full_disk_leaves_whole_records_alone(tmp_path):
    """The system's limit of a file's size stands for the disk's: it writes what fits, and then fails."""
    code = """
import resource, sys
from negtome.guard import Audit
audit = Audit(sys.argv[1], text=True)
audit.write("0", "g", "first", [], "allow", [], [])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (1, 100, 300):
    resource.setrlimit(resource.RLIMIT_FSIZE, (audit.path.stat().st_size + room, hard))
    try:
        audit.write("0", "g", "lost", ["x" * 5000], "allow", [], [])
    except OSError as error:
        print(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    audit.write("0", "g", f"after {room}", [], "allow", [], [])
"""
    file = tmp_path / "audit.jsonl"
    done = subprocess.run([sys.executable, "-c", code, file], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["OSError"] * 3), done.stderr
    assert [row["prompt"] for row in lines(file)] == ["first", "after 1", "after 100", "after 300"]


def test_a_lock_that_nobody_gives_back_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("negtome.guard.audit.LOCK_WAIT", 0.05)
    file = tmp_path / "audit"
    with FileLock(f"{file}.lock"), pytest.raises(TimeoutError, match=r"its lock held for 0\.05 s"):
        Audit(file).write("0", "g", "a tree", [], "allow", [], [])
    Audit(file).write("0", "g", "a tree", [], "allow", [], [])
    assert len(lines(file)) == 1
