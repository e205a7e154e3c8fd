"""`python -m negtome.guard`: what its commands print, and by what they end."""

import json
import subprocess
import sys

import pytest

from experiments import PROJECT
from negtome.guard import Keyword, read_policy
from negtome.guard.__main__ import main
from negtome.guard.testing import count_requests

PUBLISHED = str(PROJECT / "conf" / "safety" / "policy.yaml")
OWN = """
import sys
import threading
from negtome.guard import Decision

class Own:
    name, id = "own", "own-1"

    def reply(self, policy, prompt):
        return Decision("refuse", ("C2",), "a red angry mask", "\\x1b[2J!\\nallow")

def own(reply=Own.reply, **attributes):
    return type("Own", (Own,), {"reply": reply, **attributes})

def endless(*_):
    clauses = []
    clauses.append(clauses)
    return Decision("allow", clauses)

Forging = own(lambda *_: Decision("allow", ("C9",)))
Text = own(lambda *_: '{"action": "allow", "clauses": [], "quote": ""}')
Raising = own(lambda *_: {}["C1\\n"])
Leaving = own(lambda *_: sys.exit(0))  # the code of allow
Locked = own(lambda *_: Decision("allow", threading.Lock()))
Endless = own(endless)
Unmade = own(__init__=lambda self: self.clauses["C1"])
Numbered = own(id=5)
Nameless = own(name=property(lambda self: 1 / 0))
Untimed = own(reply_before=lambda *_: Decision("allow"))

class Nested:
    guard = Own()

class Unfinished:
    name = "unfinished"

    def reply(self, policy, prompt):
        return ""

ready = Own()
def make(): return Own()
def needs(folder): return Own()
number = 3
"""


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def file(document, written):
    return written(document)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_guard.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_guard"
    sys.modules.pop("own_guard", None)


def test_every_command_has_help(run):
    code, out, _ = run("--help")
    assert code == 0 and run() == (2, out, "")
    for command in ("check", "explain", "test"):
        code, options, _ = run(command, "--help")
        assert f"python -m negtome.guard {command}" in out and code == 0 and "--policy" in options


@pytest.mark.parametrize("prompt", ["-h", "--help", "-hh", "--raw", "--guard=keyword"])
def test_a_prompt_that_looks_like_an_option_does_not_end_as_an_allow(prompt, run, file):
    try:
        code, _, _ = run("explain", "--policy", file, "--guard", "own_guard:Own", prompt)
    except SystemExit as left:
        code = left.code
    assert code == 2


def test_it_runs_as_a_module_from_anywhere(tmp_path, file):
    (tmp_path / "mine.py").write_text(OWN)
    arguments = ["explain", "--policy", file, "--guard", "mine:Own", "--", "--help"]
    command = [sys.executable, "-m", "negtome.guard", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (4, "") and done.stdout.startswith("refuse\n")


def test_check_says_what_a_policy_holds(run, file, policy):
    code, out, err = run("check", "--policy", file)
    assert (code, err) == (0, "")
    assert "clauses     3: 1 steer, 1 refuse, 1 escalate; default allow" in out
    assert "exceptions  2" in out and "examples    4 of the clauses, 3 near to them" in out
    words = len(policy.render().split())
    assert f"rendered    {words} words, about {round(len(policy.render()) / 4)} tokens" in out
    assert all(policy.criterion(clause.id) in out for clause in policy.clauses)
    assert "advice: E1, E2 without an example" in out and "advice: E2 has no names" in out and out.count("advice") == 2
    assert run("check", "--policy", file, "--render") == (0, policy.render(), "")


def test_check_gives_advice_and_does_not_fail(run, document, written):
    assert "advice: models read policies of up to 600 tokens best" in run("check", "--policy", PUBLISHED)[1]
    del document["clauses"][0]["examples"]
    code, out, _ = run("check", "--policy", written(document))
    assert code == 0 and "advice: C1 without examples of both kinds: nothing tests them" in out
    clauses = [{"request": "a parody of a goblin", "action": "allow", "clauses": ["C2", "E1"]}]
    clauses += [{"request": "a goblin in a school book", "action": "escalate", "clauses": ["C2", "E2"]}]
    out = run("check", "--policy", written(document | {"examples": clauses}))[1]
    assert "advice: E1" not in out and ", 2 of exceptions and of several clauses" in out


@pytest.mark.parametrize(
    ("prompt", "code", "first"),
    [("a tree", 0, "allow"), ("a vampire", 3, "steer"), ("a goblin", 4, "refuse"), ("a police officer", 5, "escalate")],
)
def test_explain_ends_by_what_was_decided(prompt, code, first, run, file):
    ended, out, err = run("explain", "--policy", file, "--guard", "keyword", prompt)
    assert (ended, out.splitlines()[0], err) == (code, first, "")


def test_explain_prints_what_it_cites_and_the_very_reply(run, file, policy):
    prompt = "a parody of a vampire"
    _, out, _ = run("explain", "--policy", file, "--guard", "keyword", prompt)
    assert all(f"  cites      {policy.criterion(name)}\n" in out for name in ("C1", "E1"))
    assert f"  quotes     {policy['E1'].line}\n" in out and "  rationale  names vampire\n" in out
    assert "--- reply" not in out
    _, out, _ = run("explain", "--policy", file, "--guard", "keyword", "--raw", prompt)
    assert f"--- reply\n{Keyword().reply(policy, prompt).to_json()}\n" in out


def test_what_does_not_follow_is_invalid_and_says_why(run, file, own):
    code, out, _ = run("explain", "--policy", file, "--guard", f"{own}:Forging", "a tree")
    assert code == 5 and out.startswith("invalid\n") and "cites" not in out
    assert "  fault      expected ids of the policy, got 'C9'\n" in out and "replies: 2" in out


def test_what_a_guard_writes_does_not_move_the_cursor(run, file, own):
    _, out, _ = run("explain", "--policy", file, "--guard", f"{own}:Own", "--raw", "a tree")
    assert "\x1b" not in out and r"rationale  \x1b[2J! allow" in out
    assert "allow" not in out.splitlines()


@pytest.mark.parametrize("attribute", ["Locked", "Endless"])
def test_clauses_that_cannot_be_copied_are_invalid(attribute, run, file, own):
    code, out, err = run("explain", "--policy", file, "--guard", f"{own}:{attribute}", "a tree")
    assert (code, err) == (5, "") and "fault      expected clauses as a list of ids, got " in out


@pytest.mark.parametrize("attribute", ["Own", "ready", "make", "Nested.guard"])
def test_a_guard_of_ones_own_is_an_object_or_makes_one(attribute, run, file, own):
    code, out, _ = run("explain", "--policy", file, "--guard", f"{own}:{attribute}", "a tree")
    assert code == 4 and "own-1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guard", "keywords"], "expected keyword, mini, chat or MODULE:ATTRIBUTE as --guard, got 'keywords'"),
        (["--guard", "own_guard:"], "expected keyword, mini, chat or MODULE:ATTRIBUTE"),
        (["--guard", "no_such_module:Own"], "No module named 'no_such_module'"),
        (["--guard", "own_guard:Absent"], "expected Absent in own_guard, got"),
        (["--guard", "own_guard:needs"], "or what makes one without arguments, at own_guard:needs, got"),
        (["--guard", "own_guard:Text"], "expected a Decision or a Reply from the guard own, got str"),
        (["--guard", "own_guard:Raising"], "the guard own failed: KeyError: "),
        (["--guard", "own_guard:Leaving"], "the guard own failed: SystemExit: 0"),
        (["--guard", "own_guard:Unmade"], "the guard own_guard:Unmade failed: AttributeError: "),
        (["--guard", "own_guard:Numbered"], "the guard Own failed: TypeError: expected its id as a text, got int"),
        (["--guard", "own_guard:Nameless"], "the guard own_guard:Nameless failed: ZeroDivisionError: "),
        (["--guard", "own_guard:Untimed"], "the guard own failed: AttributeError: "),
        (["--guard", "own_guard:number"], "or what makes one without arguments, at own_guard:number, got 3"),
        (["--guard", "own_guard:Unfinished"], "reply, name and id at own_guard:Unfinished, got one without id"),
        (["--guard", "chat"], "expected --base-url, --model, or --folder with --guard chat"),
        (["--guard", "chat", "--model", "m"], "expected --base-url with --guard chat"),
        (["--guard", "chat", "--folder", "f", "--context", "9"], "expected no --context with --guard chat"),
        (["--guard", "chat", "--folder", "no/such"], "expected a model of transformers in no/such"),
        (["--guard", "keyword", "--model", "m"], "expected no --model with --guard keyword"),
        (["--guard", "chat", "--model", "m", "--base-url", "http://127.0.0.1:1/v1"], "got no connection"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(arguments, message, run, file, own):
    code, out, err = run("explain", "--policy", file, *arguments, "a tree")
    assert (code, out) == (2, "") and message in err and err.startswith("explain: ") and err.count("\n") == 1


def test_so_does_what_is_no_policy_or_no_prompt(run, file, own, tmp_path):
    for arguments, message in (
        (["check", "--policy", tmp_path / "none.yaml"], "got no file"),
        (["check", "--policy", tmp_path], "got no file"),
        (["explain", "--policy", file, "--guard", "keyword", " "], "expected a prompt of 1 to"),
        (["explain", "--policy", file, "--guard", "keyword", "x" * 10_000], "got 10000: 'xxx"),
        (["test", "--policy", file, "--guard", "keyword", "--edits", "4"], "expected to edit 0 to 3 clauses"),
        (["test", "--policy", file, "--guard", "keyword", "--audit", tmp_path], "Is a directory"),
        (["test", "--policy", file, "--guard", "own_guard:Raising", "--json", tmp_path], "can be written as --json"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    for arguments in (["frob"], ["test"], ["check", "--policy", file, "--rend"]):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 2


def test_where_an_error_is_from_is_shown_on_request(monkeypatch, run, tmp_path):
    monkeypatch.setenv("NEGTOME_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="got no file"):
        run("check", "--policy", tmp_path / "none.yaml")


def test_a_guard_that_obeys_passes_the_published_policy(run):
    code, out, err = run("test", "--policy", PUBLISHED, "--guard", "keyword")
    requests = count_requests(read_policy(PUBLISHED))
    assert (code, err) == (0, "") and out.startswith(f"keyword-2: {requests} requests, each once more")
    assert "failed" not in out and "| example | 40/40 | " in out


def test_a_guard_that_does_not_fails_and_all_of_it_is_written(run, file, own, tmp_path, policy):
    report, audit = tmp_path / "new" / "report.json", tmp_path / "audit.jsonl"
    code, out, _ = run(
        "test", "--policy", file, "--guard", f"{own}:Own", "--edits", 1, "--json", report, "--audit", audit
    )
    written = json.loads(report.read_text())
    wrong = [outcome for outcome in written["outcomes"] if not outcome["right"]]
    assert code == 1 and wrong and written["passed"] is False
    assert "failed, as it is: 'draw a vampire' must be steer C1, got refuse C2\n" in out
    assert out.count("failed, ") == min(10, len(wrong)) and f"and {len(wrong) - 10} more: --json FILE has all" in out
    described = [written[name] for name in ("policy_sha256", "guard", "edits", "seed")]
    assert described == [policy.sha256, "own-1", 1, 0]
    example = written["tally"][0]
    assert (example["kind"], example["right"], example["n"]) == ("example", 1, 7)
    assert len(audit.read_text().splitlines()) == count_requests(policy, 1)
    assert run("test", "--policy", file, "--guard", "keyword", "--json", report)[0] == 0
    assert json.loads(report.read_text())["passed"] is True


def test_invalid_replies_are_counted_apart(run, file, own):
    code, out, _ = run("test", "--policy", file, "--guard", f"{own}:Forging", "--edits", 0)
    assert code == 1 and "| example | 0/7   | -" in out and "| 7/7" in out
    assert "got invalid (expected ids of the policy, got 'C9')" in out
