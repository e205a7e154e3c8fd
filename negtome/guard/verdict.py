"""From a prompt to what is done about it: ask a guard, verify its reply, ask once more, keep a record."""

import time
from dataclasses import dataclass
from typing import Protocol

from negtome.guard.audit import Audit
from negtome.guard.decision import Decision, parse, verify
from negtome.guard.policy import Policy

#: Characters of a prompt; text encoders of image models read about 2,000.
LONGEST = 4000


class Guard(Protocol):
    """Whoever decides.

    Attributes:
        name: in tables.
        id: changes whenever it might decide otherwise: with its weights, thresholds, model, address.
    """

    name: str
    id: str

    def reply(self, policy: Policy, prompt: str) -> str:
        """Return a text with one JSON object as `Decision.to_json` writes it.

        Raises:
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
        return () if self.action == "invalid" else self.decision.clauses

    @property
    def quote(self) -> str:
        """The words of the policy that it rests on; "" where it cites nothing."""
        return "" if self.action == "invalid" else self.decision.quote

    @property
    def reason(self) -> str:
        """Why, in one line, for whoever asked."""
        if self.action == "invalid":
            return f"the guard's reply did not follow from the policy: {self.faults[0]}"
        return f"the policy says: {self.quote}" if self.quote else "no clause of the policy applies"


def decide(policy: Policy, guard: Guard, prompt: str, audit: Audit | None = None, retries: int = 1) -> Verdict:
    """Let a guard decide a prompt by a policy.

    Args:
        policy: from `read_policy`.
        guard: whoever has `reply`.
        prompt: what is asked for, 1 to `LONGEST` characters.
        audit: where the verdict is recorded.
        retries: how often more it is asked where a reply does not follow from the policy.

    Raises:
        ValueError: the prompt is empty or too long, or the guard cannot read it or the policy whole.
        ConnectionError: the guard does not answer.
    """
    if not prompt.strip() or len(prompt) > LONGEST:
        raise ValueError(f"expected a prompt of 1 to {LONGEST} characters, got {len(prompt)}: {prompt[:40]!r}")
    replies, start = [], time.perf_counter()
    for _ in range(1 + retries):
        replies.append(guard.reply(policy, prompt))
        decision, faults = None, []
        try:
            decision = parse(replies[-1])
            faults = verify(policy, decision)
        except ValueError as error:
            faults = [str(error)]
        if not faults:
            break
    seconds = round(time.perf_counter() - start, 4)
    verdict = Verdict("invalid" if faults else decision.action, decision, tuple(faults), tuple(replies), seconds)
    if audit is not None:
        audit.write(policy.sha256, guard.id, prompt, replies, verdict.action, verdict.clauses, faults)
    return verdict
