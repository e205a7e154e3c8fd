"""A guard's reply: found among whatever is around it, and verified against the policy that it claims to follow."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from negtome.guard.policy import ACTIONS, Clause, Policy


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

    Raises:
        ValueError: there is none, or several that differ, or a field is of another kind.
    """
    found = [entry for entry in _objects(reply) if "action" in entry]
    if not found or any(entry != found[0] for entry in found):
        shown = " ".join(reply.split())[:80] or "nothing"
        raise ValueError(f"expected one JSON object with an action, got {len(found) or 'none'} in: {shown}")
    entry, texts = found[0], ("action", "quote", "rationale")
    clauses, confidence = entry.get("clauses", []), entry.get("confidence")
    if not isinstance(clauses, list) or not all(isinstance(name, str) for name in clauses):
        raise ValueError(f"expected clauses as a list of ids, got {clauses!r}")
    if wrong := [name for name in texts if not isinstance(entry.get(name, ""), str)]:
        raise ValueError(f"expected {wrong[0]} as a text, got {entry[wrong[0]]!r}")
    if confidence is not None and not (type(confidence) in (int, float) and 0 <= confidence <= 1):
        raise ValueError(f"expected a confidence from 0 to 1, got {confidence!r}")
    action, quote, rationale = (entry.get(name, "") for name in texts)
    return Decision(action, tuple(clauses), quote, rationale, None if confidence is None else float(confidence))


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text that lie in no other."""
    decoder, found, start = json.JSONDecoder(parse_constant=lambda _: math.inf), [], text.find("{")
    while start >= 0:
        try:
            entry, end = decoder.raw_decode(text, start)
            found.append(entry)
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)
    return found


def verify(policy: Policy, decision: Decision) -> list[str]:
    """Return what is wrong with a decision, a line each; empty where it follows from the policy as it says.

    Its ids are the policy's, an exception stands beside a clause that lists it, the quote is verbatim in what is cited
    (white space aside), and the action is that of what is cited.
    """
    faults = []
    if decision.action not in ACTIONS:
        faults.append(f"expected an action among {', '.join(ACTIONS)}, got {decision.action!r}")
    if unknown := [name for name in decision.clauses if name not in policy]:
        return [*faults, f"expected ids of the policy, got {', '.join(map(repr, unknown))}"]
    listed = {name for part in decision.clauses if isinstance(policy[part], Clause) for name in policy[part].exceptions}
    if alone := [n for n in decision.clauses if not isinstance(policy[n], Clause) and n not in listed]:
        faults.append(f"expected an exception beside a clause that lists it, got {', '.join(alone)} alone")
    elif decision.action in ACTIONS and decision.action != (follows := policy.action_of(decision.clauses)):
        cited = ", ".join(decision.clauses) or "no clause"
        faults.append(f"expected the action that follows from {cited}, {follows}, got {decision.action}")
    lines = [_spaced(policy[name].line) for name in decision.clauses]
    quote = _spaced(decision.quote)
    if lines and not (quote and any(quote in line for line in lines)):
        faults.append(f"expected a quote from {', '.join(decision.clauses)}, got {decision.quote!r}")
    elif not lines and quote:
        faults.append(f"expected no quote where no clause is cited, got {decision.quote!r}")
    return faults


def _spaced(text: str) -> str:
    return " ".join(text.split())
