"""Check a policy, decide a prompt by it, or test whether a guard follows it.

    python -m negtome.guard check   --policy P [--references FOLDER] [--render]
    python -m negtome.guard explain --policy P --guard G [--raw] -- "a photo of a vampire"
    python -m negtome.guard test    --policy P --guard G [--edits N] [--json FILE] [--audit FILE]
    python -m negtome.guard audit   FILE [--head HASH]
    python -m negtome.guard queue   FOLDER list | decide ID allow|refuse --by NAME | release ID

G is keyword, mini, chat, or your own: MODULE:ATTRIBUTE, an object with name, id and reply(policy, prompt), or a
function or class that returns one. chat takes --base-url U --model M (vLLM, llama.cpp, ollama), or --folder F
(transformers).

explain exits with 0 for allow, 3 for steer, 4 for refuse, 5 for escalate, and 5 for invalid, which is a reply that does
not follow from the policy. test exits with 0 if every decision is as it must be, else with 1. audit exits with 1 if a
line was edited, removed, inserted or reordered. Bad input exits with 2. negtome guard COMMAND is the same command.
COMMAND --help lists its options, docs/safety.md explains them; NEGTOME_TRACEBACK=1 shows where an error was raised.
"""

import argparse
import importlib
import inspect
import json
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from negtome.guard import testing
from negtome.guard.audit import START, Audit, check_chain
from negtome.guard.chat import Endpoint, Local, about_tokens
from negtome.guard.keyword import Keyword
from negtome.guard.lint import lint
from negtome.guard.policy import ACTIONS, Policy, read_policy
from negtome.guard.queue import DECISIONS, STATES, Queue
from negtome.guard.references import References, read_references
from negtome.guard.verdict import Guard, GuardError, check_text, decide, guard_errors

#: Exit codes of verdicts.
EXIT = {"allow": 0, "steer": 3, "refuse": 4, "escalate": 5, "invalid": 5}
#: Arguments that print help, first or as a command's only argument.
HELP = ("-h", "--help")
#: Longest policy in tokens that gpt-oss-safeguard's guide recommends.
READ_BEST = 600
#: Arguments of guards, by the names of their options.
OPTIONS = ("base_url", "model", "folder", "max_tokens", "context", "timeout")
#: Number of failures that are printed; --json has all.
SHOWN = 10


def check(arguments: argparse.Namespace) -> int:
    """Print a summary of a policy and its reference images, with advice; errors end with 2."""
    policy = read_policy(arguments.policy)
    references = None
    if arguments.references:
        references = read_references(arguments.references, [clause.asset for clause in policy.clauses])
    text = policy.render()
    if arguments.render:
        print(_escape(text), end="")
        return 0
    violates = sum(len(clause.violates) for clause in policy.clauses)
    allowed = sum(len(clause.allowed) for clause in policy.clauses)
    actions = Counter(clause.action for clause in policy.clauses)
    by_action = ", ".join(f"{actions[action]} {action}" for action in ACTIONS if action in actions)
    print(f"{arguments.policy}: a policy, sha256 {policy.sha256[:12]}")
    print(f"clauses     {len(policy.clauses)}: {by_action}; default {policy.default}")
    print(f"exceptions  {len(policy.exceptions)}")
    several = f", {len(policy.examples)} of exceptions and of several clauses" if policy.examples else ""
    print(f"examples    {violates} of the clauses, {allowed} near to them{several}")
    tokens = about_tokens(text)
    print(f"rendered    {len(text.split())} words, about {tokens} tokens")
    for clause in policy.clauses:
        print(f"  {_line(policy.criterion(clause.id))}")
    if references is not None:
        _print_references(references)
    report = lint(policy, references)
    for advice in (*_untested(policy), *report.advice):
        print(f"advice: {_line(advice)}")
    if tokens > READ_BEST:
        print(f"advice: models read policies of up to {READ_BEST} tokens best: split it, or drop examples")
    for error in report.errors:
        print(f"error: {_line(error)}", file=sys.stderr)
    return 2 if report.errors else 0


def _print_references(references: References) -> None:
    print(f"references  {references.folder}")
    for name, files in references.images.items():
        own = f", {len(references.scoring[name])} of them in scoring/" if references.is_split else ""
        print(f"  {_line(name)}: {len(files)} images{own}")
    if references.held_out:
        print(f"  held_out: {len(references.held_out)} images")


def _untested(policy: Policy) -> list[str]:
    """Return advice on the clauses and exceptions that no example tests."""
    advice = []
    if bare := [clause.id for clause in policy.clauses if not (clause.violates and clause.allowed)]:
        advice.append(f"{', '.join(bare)} without examples of both kinds: nothing tests them")
    cited = {name for example in policy.examples for name in example.clauses}
    if untested := [exception.id for exception in policy.exceptions if exception.id not in cited]:
        advice.append(f"{', '.join(untested)} without an example under the policy's examples: nothing tests them")
    return advice


def explain(arguments: argparse.Namespace) -> int:
    """Decide one prompt, and print the words of the policy that the decision cites."""
    policy, guard = read_policy(arguments.policy), find_guard(arguments)
    verdict = decide(policy, guard, arguments.prompt, _audit(arguments))
    print(verdict.action)
    for name in verdict.clauses:
        print(f"  cites      {_line(policy.criterion(name))}")
    if verdict.quote:
        print(f"  quotes     {_line(verdict.quote)}")
    for fault in verdict.faults:
        print(f"  fault      {_line(fault)}")
    if verdict.decision and verdict.decision.rationale:
        print(f"  rationale  {_line(verdict.decision.rationale)}")
    print(f"  guard      {_line(guard.id)}; replies: {len(verdict.replies)}, in {verdict.seconds:.2f} s")
    if arguments.raw:
        for reply in verdict.replies:
            print(f"--- reply\n{_escape(reply)}")
    return EXIT[verdict.action]


def test(arguments: argparse.Namespace) -> int:
    """Have a guard decide the policy's examples, and again under edits of the policy."""
    policy, guard = read_policy(arguments.policy), find_guard(arguments)
    if arguments.json:  # checked before the first request
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        if arguments.json.is_dir() or not os.access(arguments.json.parent, os.W_OK):
            raise ValueError(f"expected a file that can be written as --json, got {arguments.json}")
    requests = testing.count_requests(policy, arguments.edits, arguments.seed)
    print(f"{_line(guard.id)}: {requests} requests, each once more where a reply does not follow", flush=True)
    audit = _audit(arguments)
    outcomes = testing.run_examples(policy, guard, audit)
    outcomes += testing.run_edits(policy, guard, arguments.edits, arguments.seed, audit)
    failed = [one for one in outcomes if not one.right]
    print(testing.table(outcomes))
    for one in failed[:SHOWN]:
        under = "as it is" if one.kind == "example" else f"after {one.kind} of {one.clause}"
        why = f" ({one.reason})" if one.invalid else ""
        print(_line(f"failed, {under}: {one.prompt!r} must be {one.expected}, got {one.got}{why}"))
    if len(failed) > SHOWN:
        print(f"and {len(failed) - SHOWN} more: --json FILE has all")
    if arguments.json:
        report = {
            "policy_sha256": policy.sha256,
            "guard": guard.id,
            "edits": arguments.edits,
            "seed": arguments.seed,
            "passed": not failed,
            "tally": [asdict(row) for row in testing.tally(outcomes)],
            "outcomes": [asdict(one) for one in outcomes],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(bool(failed))


def audit(arguments: argparse.Namespace) -> int:
    """Check the hash chain of an audit file, and print the hash of its last line."""
    report = check_chain(arguments.file, arguments.head)
    print(f"records     {report.records} in a chain")
    if report.unchained:
        print(f"unchained   {report.unchained} lines before the first chained record: nothing protects them")
    if report.unfinished:
        print(f"unfinished  {report.unfinished} lines, which killed processes left")
    if report.fault:
        print(f"broken      {report.fault}")
        return 1
    print(f"head        {report.head}")
    if arguments.head is None:
        print("intact, unless lines were cut off at the end: keep the head elsewhere, and give it as --head next time")
    else:
        print("intact, and the line with your --head is still there")
    return 0


def queue(arguments: argparse.Namespace) -> int:
    """List the requests that wait for a person, decide one, or release an allowed one."""
    tickets = Queue(arguments.folder)
    if arguments.step == "list":
        if not Path(arguments.folder).is_dir():
            raise FileNotFoundError(f"no queue at {arguments.folder}: the first escalation makes it")
        listed = tickets.tickets(arguments.state)
        for ticket in listed:
            cited = ", ".join(ticket.clauses) or "no clause"
            by = f" by {ticket.by}" if ticket.by else ""
            print(_line(f"{ticket.id}  {ticket.state}{by}  {ticket.created}  {ticket.action}, {cited}"))
            fields = {name: value for name, value in ticket.request.items() if value is not None}
            print(f"    {_line(json.dumps(fields, ensure_ascii=False))}")
        print("1 request" if len(listed) == 1 else f"{len(listed)} requests")
        return 0
    if arguments.step == "decide":
        ticket = tickets.decide(arguments.id, arguments.decision, arguments.by)
        then = "; release it, and the client can send it again" if ticket.state == "allowed" else ""
        print(_line(f"{ticket.id} is {ticket.state} by {ticket.by}{then}"))
        return 0
    ticket = tickets.release(arguments.id)
    print(
        f"{ticket.id} is released: exactly this request makes images under this policy when the client sends it again"
    )
    return 0


def find_guard(arguments: argparse.Namespace, prefix: str = "") -> Guard:
    """Return the guard that the arguments name; the guard's own options have the prefix of `add_guard_options`.

    Raises:
        ValueError: there is no such guard, or its options are missing or unknown.
        ImportError, FileNotFoundError: its module or folder does not exist.
    """
    values = {name: getattr(arguments, prefix.replace("-", "_") + name, None) for name in OPTIONS}
    options = {name: value for name, value in values.items() if value is not None}
    builders: dict[str, tuple[Callable[..., Guard], set[str], set[str]]] = {
        "keyword": (Keyword, set(), set()),
        "mini": (_mini, set(), {"folder"}),
        "chat": (Endpoint, {"base_url", "model"}, {"max_tokens", "context", "timeout"}),
        "folder": (Local, {"folder"}, {"max_tokens"}),
    }
    kind = "folder" if arguments.guard == "chat" and "folder" in options else arguments.guard
    build, needed, optional = builders.get(kind, (partial(load_guard, arguments.guard), set(), set()))
    hint = f", or --{prefix}folder" if arguments.guard == "chat" and not options else ""
    check_options(options, needed, optional, prefix, f"with --guard {arguments.guard}", hint)
    return build(**options)


def check_options(
    options: Collection[str], needed: set[str], optional: set[str], prefix: str, choice: str, hint: str = ""
) -> None:
    """Raise ValueError if an option is missing, or is not one of those that a choice takes.

    Args:
        options: names of those that the command line has.
        needed: names of those that it must have.
        optional: names of those that it may have.
        prefix: of the options on the command line.
        choice: ends the message, such as "with --guard chat".
        hint: what may be added instead.
    """
    present = set(options)
    for negation, names in (("", needed - present), ("no ", present - needed - optional)):
        if names:
            listed = ", ".join(f"--{prefix}{name.replace('_', '-')}" for name in sorted(names))
            raise ValueError(f"expected {negation}{listed}{hint} {choice}")


def _mini(folder: str = "models/mini-guard") -> Guard:
    from negtome.guard.mini import Mini  # loads torch

    return Mini(folder)


def load_guard(name: str) -> Guard:
    """Return the guard that MODULE:ATTRIBUTE names; errors are those of `find_guard`."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected keyword, mini, chat or MODULE:ATTRIBUTE as --guard, got {name!r}")
    guard: Guard = load_object(name, "a guard", ("reply", "name", "id"))
    check_text(guard, "id")
    return guard


def load_object(name: str, kind: str, parts: Sequence[str]) -> Any:
    """Return the object that MODULE:ATTRIBUTE names, or makes without arguments.

    Args:
        name: MODULE:ATTRIBUTE.
        kind: in messages, such as "a guard".
        parts: attributes that it must have.

    Raises:
        ValueError, ImportError: there is no such object, or an attribute is missing.
        GuardError: its code fails.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected {kind} as MODULE:ATTRIBUTE, got {name!r}")
    with guard_errors(name):
        loaded: Any = _import(name, module, attribute, parts[0])
        missing = [part for part in parts if not hasattr(loaded, part)]
    if missing:
        listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
        raise ValueError(f"expected {kind} with {listed} at {name}, got one without {', '.join(missing)}")
    return loaded


def _import(name: str, module: str, attribute: str, part: str) -> Any:
    imported = importlib.import_module(module)
    try:
        value = operator.attrgetter(attribute)(imported)
    except AttributeError as error:
        raise ImportError(f"expected {attribute} in {module}, got {error}") from error
    if hasattr(value, part) and not isinstance(value, type):
        return value
    try:
        inspect.signature(value).bind()
    except TypeError as error:
        raise ValueError(
            f"expected an object with {part}, or what makes one without arguments, at {name}, got {error}"
        ) from error
    return value()


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code; see the module."""
    if not argv or argv[0] in HELP:
        print(__doc__.strip())
        return 0 if argv else 2
    parser, commands = _parsers()
    if len(argv) == 2 and argv[0] in commands and argv[1] in HELP:  # alone: else it may be a prompt, and 0 is allow
        commands[argv[0]].print_help()
        return 0
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except (ValueError, OSError, ImportError, GuardError) as error:
        if os.environ.get("NEGTOME_TRACEBACK"):
            raise
        print(f"{arguments.command}: {_line(str(error))}", file=sys.stderr)
        return 2


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of all arguments, and the parsers of the commands by their names."""
    parser = argparse.ArgumentParser(prog="python -m negtome.guard", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {}
    for run in (check, explain, test):
        part = commands.add_parser(run.__name__, help=run.__doc__, allow_abbrev=False, add_help=False)
        part.set_defaults(run=run)
        part.add_argument("--policy", metavar="P", required=True, help="YAML file, see docs/safety.md")
        parts[run.__name__] = part
    parts["check"].add_argument("--references", metavar="FOLDER", help="images of the concepts, see docs/own-policy.md")
    parts["check"].add_argument("--render", action="store_true", help="print only the system message")
    for part in (parts["explain"], parts["test"]):
        add_guard_options(part)
        part.add_argument("--audit", metavar="FILE", help="append every verdict, without texts")
    parts["explain"].add_argument("--raw", action="store_true", help="print the guard's replies, too")
    parts["explain"].add_argument("prompt", help="the prompt, after -- if it begins with a -")
    parts["test"].add_argument(
        "--edits", type=int, metavar="N", help="edit N clauses instead of all; 0: only the examples"
    )
    parts["test"].add_argument("--seed", type=int, default=0, help="seed for drawing the clauses")
    parts["test"].add_argument("--json", type=Path, metavar="FILE", help="write all outcomes")
    parts |= _record_parsers(commands)
    return parser, parts


def _record_parsers(commands: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the commands of files, which need no policy."""
    parts = {}
    for run in (audit, queue):
        parts[run.__name__] = commands.add_parser(run.__name__, help=run.__doc__, allow_abbrev=False)
        parts[run.__name__].set_defaults(run=run)
    parts["audit"].add_argument("file", metavar="FILE", help="of --audit")
    parts["audit"].add_argument("--head", metavar="HASH", type=_head, help="that an earlier check printed")
    parts["queue"].add_argument("folder", metavar="FOLDER", help="of negtome serve --queue")
    steps = parts["queue"].add_subparsers(dest="step", required=True)
    listing = steps.add_parser("list", allow_abbrev=False)
    listing.add_argument("--state", choices=STATES, help="only these")
    deciding = steps.add_parser("decide", allow_abbrev=False)
    deciding.add_argument("id", metavar="ID")
    deciding.add_argument("decision", choices=DECISIONS)
    deciding.add_argument("--by", metavar="NAME", required=True, help="who decides")
    steps.add_parser("release", allow_abbrev=False).add_argument("id", metavar="ID")
    return parts


def _head(text: str) -> str:
    if len(text) != len(START) or not set(text) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"must be a hash of {len(START)} hexadecimal digits, got {text[:80]!r}")
    return text


def add_guard_options(part: argparse._ActionsContainer, prefix: str = "", guard: str | None = None) -> None:
    """Add --guard, required unless it has a default, and the guard's own options, --PREFIXmodel and so on."""
    default = "" if guard is None else f" ({guard})"
    part.add_argument(
        "--guard", metavar="G", required=guard is None, default=guard,
        help=f"keyword, chat, MODULE:ATTRIBUTE, or mini, which was trained on names and tags of one policy{default}",
    )  # fmt: skip
    options: tuple[tuple[str, str, type, str], ...] = (
        ("base-url", "U", str, "chat: address of the server, such as http://host:8000/v1"),
        ("model", "M", str, "chat: the server's name of the model"),
        ("folder", "F", str, "chat, mini: folder of the model"),
        ("max-tokens", "N", int, "chat: longest reply, reasoning included (1024)"),
        ("context", "N", int, "chat: longest conversation of a server that cuts off silently"),
        ("timeout", "S", float, "chat: seconds for a decision (60)"),
    )
    for name, metavar, kind, text in options:
        part.add_argument(f"--{prefix}{name}", metavar=metavar, type=kind, help=text)


def _audit(arguments: argparse.Namespace) -> Audit | None:
    return Audit(arguments.audit) if arguments.audit else None


def _escape(text: str) -> str:
    """Return a text with escapes for control characters, by which a model could move the terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _line(text: str) -> str:
    """Return a text as one line, so that a model cannot forge the command's next line."""
    return _escape(" ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
