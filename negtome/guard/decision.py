"""A guard's reply: found among whatever is around it, and verified against the policy that it claims to follow."""

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from negtome.guard.policy import ACTIONS, Clause, Policy

#: What stands between a model's thinking and its answer: the last of a reply counts.
THOUGHT = re.compile(r"</think(?:ing)?>|<\|channel\|>final\b.*?<\|message\|>", re.DOTALL)
#: What a reply begins with that is all thinking until then.
THINKING = re.compile(r"\s*(?:<think(?:ing)?>|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b)")


class UnusableReplyError(ValueError):
    """Raised by a guard that knows its reply to be none, such as one that was cut off; `text` is as far as it came."""

    def __init__(self, fault: str, text: str = "") -> None:
        super().__init__(fault)
        self.text = text


@dataclass(frozen=True)
class Decision:
    """What a guard decided.

    Attributes:
        action: one of `ACTIONS`.
        clauses: ids of all that applies, clauses and exceptions.
        quote: words of one of them; "" where there are none.
        rationale: the guard's own words, which nothing vouches for: a rationale is no reason.
        confidence: in [0, 1], as the guard says; None where it does not.
    """

    action: str
    clauses: tuple[str, ...] = ()
    quote: str = ""
    rationale: str = ""
    confidence: float | None = None

    def to_json(self) -> str:
        """Return it as `parse` reads it."""
        return json.dumps(asdict(self) | {"clauses": list(self.clauses)}, ensure_ascii=False)


def parse(reply: str) -> Decision:
    """Read the one JSON object with an action in a reply, whatever prose is around it.

    What a model thinks before it answers is left out, with all that it drafts there.

    Raises:
        ValueError: there is none, or several that differ, or parts of another, or a field is of another kind.
    """
    answer = THOUGHT.split(reply)[-1]
    if answer == reply and THINKING.match(reply):
        raise ValueError(f"expected an answer after thinking, got none in: {_shown(reply)}")
    objects, rest = _objects(answer)
    found = [entry for entry in objects if "action" in entry]
    if not found or any(entry != found[0] for entry in found):
        raise ValueError(f"expected one JSON object with an action, got {len(found) or 'none'} in: {_shown(answer)}")
    # A whole object may be a part of a broken one, such as a prompt that the model repeats without escaping it.
    if re.search(r"[\"']action\\?[\"']\s*:", rest):
        raise ValueError(f"expected one JSON object with an action, got one and parts of another in: {_shown(answer)}")
    entry, texts = found[0], ("action", "quote", "rationale")
    clauses, confidence = entry.get("clauses", []), entry.get("confidence")
    if not isinstance(clauses, list) or not all(isinstance(name, str) for name in clauses):
        raise ValueError(f"expected clauses as a list of ids, got {clauses!r}")
    if wrong := [name for name in texts if not isinstance(entry.get(name, ""), str)]:
        raise ValueError(f"expected {wrong[0]} as a text, got {entry[wrong[0]]!r}")
    if confidence is not None and not (type(confidence) in (int, float) and 0 <= confidence <= 1):
        raise ValueError(f"expected a confidence from 0 to 1, got {confidence!r}")
    action, quote, rationale = (whole(entry.get(name, "")) for name in texts)
    confidence = None if confidence is None else float(confidence)
    return Decision(action, tuple(map(whole, clauses)), quote, rationale, confidence)


def whole(text: str) -> str:
    """Return a text with question marks for halves of characters, which models write and no file can keep."""
    return text.encode(errors="replace").decode()


def _objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the JSON objects in a text that lie in no other, and the text without them."""
    decoder = json.JSONDecoder(parse_constant=lambda _: math.inf, object_pairs_hook=_once)
    found, rest, end = [], "", 0
    while (start := text.find("{", end)) >= 0:
        rest += text[end:start]
        try:
            entry, end = decoder.raw_decode(text, start)
            found.append(entry)
        except (ValueError, RecursionError):
            end = start + 1
    return found, rest + text[end:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entry := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice: which one is meant?")
    return entry


def _shown(text: str) -> str:
    return " ".join(text.split())[:80] or "nothing"


def verify(policy: Policy, decision: Decision) -> list[str]:
    """Return what is wrong with a decision, a line each; empty where it follows from the policy as it says.

    Its ids are the policy's, an exception stands beside a clause that lists it, the quote is whole words of one of the
    criteria that it cites, verbatim (white space aside) and not its id or action alone, and the action is that of what
    is cited.
    """
    faults = []
    if decision.action not in ACTIONS:
        faults.append(f"expected an action among {', '.join(ACTIONS)}, got {decision.action!r}")
    if unknown := [name for name in decision.clauses if name not in policy]:
        return [*faults, f"expected ids of the policy, got {', '.join(map(repr, unknown))}"]
    cited = [policy[name] for name in decision.clauses]
    listed = {name for part in cited if isinstance(part, Clause) for name in part.exceptions}
    if alone := [n for n in decision.clauses if not isinstance(policy[n], Clause) and n not in listed]:
        faults.append(f"expected an exception beside a clause that lists it, got {', '.join(alone)} alone")
    elif decision.action in ACTIONS and decision.action != (follows := policy.action_of(decision.clauses)):
        shown = ", ".join(decision.clauses) or "no clause"
        faults.append(f"expected the action that follows from {shown}, {follows}, got {decision.action}")
    lines = [_spaced(policy.criterion(name)) for name in decision.clauses]
    quote = _spaced(decision.quote)
    words = rf"(?<!\w){re.escape(quote)}(?!\w)"
    said = set(re.findall(r"\w{3,}", quote)) - {*decision.clauses, *ACTIONS, "except"}  # of what it is about
    if lines and not (said and any(re.search(words, line) for line in lines)):
        faults.append(f"expected a quote from {', '.join(decision.clauses)}, got {decision.quote!r}")
    elif not lines and quote:
        faults.append(f"expected no quote where no clause is cited, got {decision.quote!r}")
    return faults


def read_reply(policy: Policy, reply: str) -> tuple[Decision | None, list[str]]:
    """Return what a reply decides, as far as it can be read, and what is wrong with it, a line each."""
    try:
        decision = parse(reply)
    except ValueError as error:
        return None, [str(error)]
    return decision, verify(policy, decision)


def _spaced(text: str) -> str:
    return " ".join(text.split())
