"""A guard's reply: the one JSON object in it is read strictly, and verified against the policy it claims to follow."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from negtome.guard.policy import ACTIONS, Policy, brief

#: Fields of a decision; an object in a text has a nonce, too, and no other field.
FIELDS = frozenset({"action", "clauses", "quote", "rationale", "confidence"})
#: Hexadecimal digits of a nonce: 64 random bits, which no author of a prompt can guess.
NONCE_DIGITS = 16
#: Closed blocks in which models reason before they answer: the tags of most, the analysis channel of gpt-oss.
REASONING = re.compile(
    r"\s*(?:<(think|thinking)>.*?</\1>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>.*?<\|end\|>)",
    re.DOTALL,
)
#: How gpt-oss announces its answer.
FINAL = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>final(?: ?<\|constrain\|>json)?<\|message\|>")
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class UnusableReplyError(ValueError):
    """Raised by a guard that cannot use its model's reply, such as one that was cut off; `text` is what came."""

    def __init__(self, fault: str, text: str = "") -> None:
        super().__init__(fault)
        self.text = str(text)


@dataclass(frozen=True)
class Reply:
    """The text of a guard that is a language model, and the nonce that its request asked for.

    Attributes:
        text: as the model wrote it.
        nonce: from `new_nonce`, used for no other request. A decision in the text counts only if it repeats the nonce.
    """

    text: str
    nonce: str


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

    @classmethod
    def from_fields(cls, entry: Mapping[str, Any]) -> "Decision":
        """Build a decision from a mapping with exactly `FIELDS`.

        Raises:
            ValueError: a field is missing, unknown or of another kind.
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
        """Return a JSON object with all fields; with a nonce, it is the object that `parse` reads."""
        entry = asdict(self) | {"clauses": list(self.clauses)}
        return json.dumps(entry if nonce is None else {"nonce": nonce, **entry}, ensure_ascii=False)


def new_nonce(prompt: str) -> str:
    """Return a random code for one request, `NONCE_DIGITS` hexadecimal digits that do not occur in the prompt."""
    while (nonce := secrets.token_hex(NONCE_DIGITS // 2)) in prompt:
        pass
    return nonce


def parse(text: str, nonce: str, prompt: str) -> Decision:
    """Read the decision in a language model's reply.

    The reply is one JSON object with all fields of a decision and the request's nonce. Closed reasoning blocks may come
    before it, one code fence around it, and white space anywhere. Nothing else may.

    Args:
        text: the reply.
        nonce: what the request asked for, see `new_nonce`.
        prompt: the request. An object that it contains is never accepted, since it must not contain the nonce.

    Raises:
        ValueError: the reply is anything else, or the nonce is too short or occurs in the prompt.
    """
    if len(nonce) < NONCE_DIGITS or nonce in prompt:
        raise ValueError(f"expected a nonce of {NONCE_DIGITS} digits that the prompt does not contain: use new_nonce")
    answer = after_reasoning(text).strip()
    if fenced := FENCE.fullmatch(answer):
        answer = fenced.group(1)
    try:
        entry = read_json(answer)
    except ValueError as error:
        raise ValueError(f"expected one JSON object and nothing else, got {_shown(answer)}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"expected one JSON object, got {_shown(answer)}")
    if entry.get("nonce") != nonce:
        raise ValueError("expected the nonce of the request in the object, got another or none")
    return Decision.from_fields({name: value for name, value in entry.items() if name != "nonce"})


def after_reasoning(text: str) -> str:
    """Return what follows the closed reasoning blocks at the start of a model's reply."""
    end = 0
    while block := REASONING.match(text, end):
        end = block.end()
    if final := FINAL.match(text, end):
        end = final.end()
    return text[end:]


def read_json(text: str) -> Any:
    """Parse JSON strictly.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a name twice in one object, NaN or an infinity.
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
    """Return a text with question marks for halves of characters, which models write and no file can keep."""
    return text.encode(errors="replace").decode()


def _shown(text: str) -> str:
    return " ".join(text[:400].split())[:80] or "nothing"


def verify(policy: Policy, decision: Decision) -> list[str]:
    """Return what is wrong with a decision, a line each; empty where it follows from the policy as it says.

    Its ids are the policy's, an exception stands beside a clause that lists it, the quote is whole words of one of the
    criteria that it cites, verbatim (white space aside) and not its id or action alone, and the action is that of what
    is cited. No id is cited twice.
    """
    faults = []
    if decision.action not in ACTIONS:
        faults.append(f"expected an action among {', '.join(ACTIONS)}, got {brief(decision.action)}")
    if unknown := [name for name in decision.clauses if name not in policy]:
        return [*faults, f"expected ids of the policy, got {', '.join(map(brief, unknown[:5]))}"]
    if len(set(decision.clauses)) < len(decision.clauses):
        return [*faults, "expected every id once, got one several times"]
    if alone := policy.unlisted(decision.clauses):
        faults.append(f"expected an exception beside a clause that lists it, got {', '.join(alone)} alone")
    elif decision.action in ACTIONS and decision.action != (follows := policy.action_of(decision.clauses)):
        shown = ", ".join(decision.clauses) or "no clause"
        faults.append(f"expected the action that follows from {shown}, {follows}, got {decision.action}")
    lines = [_spaced(policy.criterion(name)) for name in decision.clauses]
    quote = _spaced(decision.quote)
    quoted = [line for line in lines if quote in line]  # a pattern is compiled only of words that are in the policy
    words = rf"(?<!\w){re.escape(quote)}(?!\w)" if quoted else ""
    telling = set(re.findall(r"\w{3,}", quote)) - {*decision.clauses, *ACTIONS, "except"}  # name what it is about
    if lines and not (telling and any(re.search(words, line) for line in quoted)):
        faults.append(f"expected a quote from {', '.join(decision.clauses)}, got {brief(decision.quote)}")
    elif not lines and quote:
        faults.append(f"expected no quote where no clause is cited, got {brief(decision.quote)}")
    return faults


def read_reply(policy: Policy, text: str, nonce: str, prompt: str) -> tuple[Decision | None, list[str]]:
    """Return what a language model's reply decides, as far as it can be read, and its faults, a line each."""
    try:
        decision = parse(text, nonce, prompt)
    except ValueError as error:
        return None, [str(error)]
    return decision, verify(policy, decision)


def _spaced(text: str) -> str:
    return " ".join(text.split())
