"""From a prompt to what is done about it: ask a guard, verify its reply, ask once more, keep a record."""

import time
from dataclasses import dataclass
from typing import Protocol

from negtome.guard.audit import Audit
from negtome.guard.decision import Decision, UnusableReplyError, read_reply, whole
from negtome.guard.policy import Policy

#: Characters of a prompt; text encoders of image models read about 2,000.
LONGEST = 4000


class Guard(Protocol):
    """Whoever decides.

    Attributes:
        name: in tables.
        id: changes whenever it might decide otherwise: with its weights, thresholds, model, address.
    """

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str: ...

    def reply(self, policy: Policy, prompt: str) -> str:
        """Return a text with one JSON object as `Decision.to_json` writes it.

        Raises:
            UnusableReplyError: it knows that it has no reply to this prompt, which makes the verdict invalid.
            ValueError: the policy or the prompt is longer than it can read; nothing is cut off.
            ConnectionError: it does not answer.
        """


@dataclass(frozen=True)
class Verdict:
    """A guard's decision, verified.

    Attributes:
        action: one of `ACTIONS`, or "invalid": no reply of the guard followed from the policy. That is never allow;
            whoever acts on it asks a person, and counts it apart.
        decision: the last reply, as far as it could be read.
        faults: what was wrong with the last reply; empty where the action is valid.
        replies: as they came, the last one decided.
        seconds: that the guard took.
    """

    action: str
    decision: Decision | None
    faults: tuple[str, ...]
    replies: tuple[str, ...]
    seconds: float

    @property
    def clauses(self) -> tuple[str, ...]:
        """The ids that the action rests on; none of an invalid one, whose citations are not to be trusted."""
        return () if self.action == "invalid" or self.decision is None else self.decision.clauses

    @property
    def quote(self) -> str:
        """The words of the policy that it rests on; "" where it cites nothing."""
        return "" if self.action == "invalid" or self.decision is None else self.decision.quote

    @property
    def reason(self) -> str:
        """Why, in one line, for whoever asked."""
        if self.action == "invalid":
            return f"the guard's reply did not follow from the policy: {self.faults[0]}"
        return f"the policy says: {' '.join(self.quote.split())}" if self.quote else "no clause of the policy applies"


def decide(policy: Policy, guard: Guard, prompt: str, audit: Audit | None = None, retries: int = 1) -> Verdict:
    """Let a guard decide a prompt by a policy.

    Args:
        policy: from `read_policy`.
        guard: whoever has `reply`.
        prompt: what is asked for, 1 to `LONGEST` characters.
        audit: where the verdict is recorded.
        retries: how often more it is asked where a reply does not follow from the policy.

    Raises:
        ValueError: the prompt is empty, too long or no Unicode, or the guard cannot read it or the policy whole, or
            replies by what is no text.
        ConnectionError: the guard does not answer.
    """
    if not prompt.strip() or len(prompt) > LONGEST:
        raise ValueError(f"expected a prompt of 1 to {LONGEST} characters, got {len(prompt)}: {prompt[:40]!r}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"expected a prompt in Unicode, got halves of characters: {prompt[:40]!r}")
    replies, start = [], time.perf_counter()
    for _ in range(1 + retries):
        reply, decision, faults = _ask(policy, guard, prompt)
        replies.append(reply)
        if not faults:
            break
    seconds = round(time.perf_counter() - start, 4)
    action = "invalid" if faults or decision is None else decision.action
    verdict = Verdict(action, decision, tuple(faults), tuple(replies), seconds)
    if audit is not None:
        audit.write(policy.sha256, guard.id, prompt, replies, verdict.action, verdict.clauses, faults)
    return verdict


def _ask(policy: Policy, guard: Guard, prompt: str) -> tuple[str, Decision | None, list[str]]:
    """Return a guard's reply, what it decided, as far as that can be read, and what is wrong with it."""
    try:
        reply, faults = guard.reply(policy, prompt), []
    except UnusableReplyError as error:
        reply, faults = error.text, [str(error)]
    if not isinstance(reply, str):
        raise ValueError(f"expected a text from the guard {guard.name}, got {type(reply).__name__}")
    reply = whole(reply)
    if faults:
        return reply, None, faults
    return reply, *read_reply(policy, reply)
