"""Decisions of guards: a model's reply is parsed strictly, and every decision is verified against the policy."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from negtome.guard.policy import ACTIONS, Policy, brief

#: Fields of a decision; in a model's reply, the object also has a nonce.
FIELDS = frozenset({"action", "clauses", "quote", "rationale", "confidence"})
#: Hexadecimal digits of a nonce: 64 random bits, which the author of a prompt cannot guess.
NONCE_DIGITS = 16
#: Closed blocks of reasoning before an answer: the tags of most models, the analysis channel of gpt-oss.
REASONING = re.compile(
    r"\s*(?:<(think|thinking)>.*?</\1>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>.*?<\|end\|>)",
    re.DOTALL,
)
#: How gpt-oss announces its answer.
FINAL = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>final(?: ?<\|constrain\|>json)?<\|message\|>")
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class UnusableReplyError(ValueError):
    """Raised by a guard that cannot use its model's reply, for example if it was cut off; `text` is the reply."""

    def __init__(self, fault: str, text: str = "") -> None:
        super().__init__(fault)
        self.text = str(text)


@dataclass(frozen=True)
class Reply:
    """The reply of a language model.

    Attributes:
        text: of the model.
        nonce: of the request, from `new_nonce`. A decision in the text counts only if it repeats the nonce.
    """

    text: str
    nonce: str


@dataclass(frozen=True)
class Decision:
    """A guard's decision.

    Attributes:
        action: one of `ACTIONS`.
        clauses: ids of all clauses and exceptions that apply.
        quote: words of one of them; "" without any.
        rationale: the guard's own words, which are not verified.
        confidence: the guard's, in [0, 1], or None.
    """

    action: str
    clauses: tuple[str, ...] = ()
    quote: str = ""
    rationale: str = ""
    confidence: float | None = None

    @classmethod
    def from_fields(cls, entry: Mapping[str, Any]) -> "Decision":
        """Build a decision from a mapping with exactly `FIELDS`.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        if missing := sorted(FIELDS - entry.keys()):
            raise ValueError(f"expected the fields {', '.join(sorted(FIELDS))}, got no {', '.join(missing)}")
        if unknown := sorted(str(name)[:40] for name in entry.keys() - FIELDS):
            raise ValueError(f"expected the fields {', '.join(sorted(FIELDS))}, got {', '.join(unknown)} as well")
        texts = ("action", "quote", "rationale")
        if wrong := [name for name in texts if not isinstance(entry[name], str)]:
            raise ValueError(f"expected {wrong[0]} as a text, got {brief(entry[wrong[0]])}")
        clauses, confidence = entry["clauses"], entry["confidence"]
        if not isinstance(clauses, (list, tuple)) or not all(isinstance(name, str) for name in clauses):
            raise ValueError(f"expected clauses as a list of ids, got {brief(clauses)}")
        if confidence is not None:
            if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
                raise ValueError(f"expected a confidence from 0 to 1, got {brief(confidence)}")
            confidence = float(confidence)
        action, quote, rationale = (replace_halves(entry[name]) for name in texts)
        return cls(action, tuple(map(replace_halves, clauses)), quote, rationale, confidence)

    def to_json(self, nonce: str | None = None) -> str:
        """Return a JSON object with all fields; with a nonce, `parse` reads it."""
        entry = asdict(self) | {"clauses": list(self.clauses)}
        return json.dumps(entry if nonce is None else {"nonce": nonce, **entry}, ensure_ascii=False)


def new_nonce(prompt: str) -> str:
    """Return a random code of `NONCE_DIGITS` hexadecimal digits that does not occur in the prompt."""
    while (nonce := secrets.token_hex(NONCE_DIGITS // 2)) in prompt:
        pass
    return nonce


def parse(text: str, nonce: str, prompt: str) -> Decision:
    """Read the decision in a language model's reply.

    The reply must be one JSON object with all fields of a decision and the nonce. Only closed reasoning blocks before
    it, one code fence around it, and white space are allowed in addition.

    Args:
        text: the reply.
        nonce: of the request, see `new_nonce`. It does not occur in the prompt, so that the reply cannot be a copy of
            an object in the prompt.
        prompt: the request.

    Raises:
        ValueError: the reply is anything else, or the nonce is too short or occurs in the prompt.
    """
    if nonce in prompt:
        raise ValueError(f"expected a nonce of {NONCE_DIGITS} digits that the prompt does not contain: use new_nonce")
    return Decision.from_fields(read_object(text, nonce))


def read_object(text: str, nonce: str) -> dict[str, Any]:
    """Read the one JSON object of a model's reply, and return its fields without the nonce.

    Args:
        text: the reply. Only closed reasoning blocks before the object, one code fence around it, and white space are
            allowed in addition.
        nonce: of the request, which the object must repeat in its field `nonce`.

    Raises:
        ValueError: the reply is anything else, or the nonce is too short.
    """
    if len(nonce) < NONCE_DIGITS:
        raise ValueError(f"expected a nonce of {NONCE_DIGITS} digits, got {len(nonce)}: use new_nonce")
    answer = after_reasoning(text).strip()
    if fenced := FENCE.fullmatch(answer):
        answer = fenced.group(1)
    try:
        entry = read_json(answer)
    except ValueError as error:
        raise ValueError(f"expected one JSON object and nothing else, got {_shown(answer)}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"expected one JSON object, got {_shown(answer)}")
    if entry.pop("nonce", None) != nonce:
        raise ValueError("expected the nonce of the request in the object, got another or none")
    return entry


def after_reasoning(text: str) -> str:
    """Return a model's reply without the closed reasoning blocks at its start."""
    end = 0
    while block := REASONING.match(text, end):
        end = block.end()
    if final := FINAL.match(text, end):
        end = final.end()
    return text[end:]


def read_json(text: str) -> Any:
    """Parse JSON strictly.

    Raises:
        ValueError: it is no JSON or nested too deeply, or contains a name twice in an object, NaN or an infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("expected JSON that is nested less deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("expected every name once in an object")
    return entry


def _refuse(constant: str) -> None:
    raise ValueError(f"expected numbers as JSON has them, got {constant}")


def replace_halves(text: str) -> str:
    """Return a text with question marks for lone surrogates, which models write and UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def _shown(text: str) -> str:
    return " ".join(text[:400].split())[:80] or "nothing"


def verify(policy: Policy, decision: Decision) -> list[str]:
    """Return the faults of a decision, a line each; [] if it follows from the policy.

    A decision follows if every id is in the policy and cited once, every exception is cited with a clause that lists
    it, the quote consists of complete words of a cited criterion (not only its id or action), and the action is the one
    of the citations.
    """
    faults = []
    if decision.action not in ACTIONS:
        faults.append(f"expected an action among {', '.join(ACTIONS)}, got {brief(decision.action)}")
    if unknown := [name for name in decision.clauses if name not in policy]:
        return [*faults, f"expected ids of the policy, got {', '.join(map(brief, unknown[:5]))}"]
    if len(set(decision.clauses)) < len(decision.clauses):
        return [*faults, "expected every id once, got one several times"]
    if unlisted := policy.unlisted(decision.clauses):
        faults.append(f"expected an exception beside a clause that lists it, got {', '.join(unlisted)} alone")
    elif decision.action in ACTIONS and decision.action != (action := policy.action_of(decision.clauses)):
        cited = ", ".join(decision.clauses) or "no clause"
        faults.append(f"expected the action that follows from {cited}, {action}, got {decision.action}")
    if decision.clauses and not _is_quoted(policy, decision):
        faults.append(f"expected a quote from {', '.join(decision.clauses)}, got {brief(decision.quote)}")
    elif not decision.clauses and decision.quote.strip():
        faults.append(f"expected no quote where no clause is cited, got {brief(decision.quote)}")
    return faults


def _is_quoted(policy: Policy, decision: Decision) -> bool:
    """Return whether the quote is complete words of a cited criterion, not only ids and actions."""
    quote = " ".join(decision.quote.split())
    if not set(re.findall(r"\w{3,}", quote)) - {*decision.clauses, *ACTIONS, "except"}:
        return False
    lines = [" ".join(policy.criterion(name).split()) for name in decision.clauses]
    lines = [line for line in lines if quote in line]  # first, so that no long pattern is compiled
    return any(re.search(rf"(?<!\w){re.escape(quote)}(?!\w)", line) for line in lines)


def read_reply(policy: Policy, text: str, nonce: str, prompt: str) -> tuple[Decision | None, list[str]]:
    """Return the decision in a language model's reply, None if it cannot be read, and the faults, a line each."""
    try:
        decision = parse(text, nonce, prompt)
    except ValueError as error:
        return None, [str(error)]
    return decision, verify(policy, decision)
