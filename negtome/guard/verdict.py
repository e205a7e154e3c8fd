"""From a prompt to what is done about it: ask a guard, verify its reply, ask once more, keep a record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from negtome.guard.audit import Audit
from negtome.guard.decision import FIELDS, Decision, Reply, UnusableReplyError, read_reply, replace_halves, verify
from negtome.guard.policy import Policy

#: Characters of a prompt; text encoders of image models read about 2,000.
LONGEST = 4000


class GuardError(RuntimeError):
    """Raised where a guard's own code fails: there is no verdict, and the request must not be taken as allowed."""


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

    def reply(self, policy: Policy, prompt: str) -> Decision | Reply:
        """Return a decision, or the text of a language model with the nonce that it was asked to repeat.

        Raises:
            UnusableReplyError: it knows that it has no reply to this prompt, which makes the verdict invalid.
            ValueError: the policy or the prompt is longer than it can read; nothing is cut off.
            ConnectionError: it does not answer.
        """


class RemoteGuard(Guard, Protocol):
    """A guard that somebody else's computer may keep waiting.

    Attributes:
        timeout: seconds that all tries of one decision may take together.
    """

    @property
    def timeout(self) -> float: ...

    def reply_before(self, policy: Policy, prompt: str, deadline: float) -> Decision | Reply:
        """Return what `reply` does, before `time.monotonic()` comes to the deadline; ConnectionError otherwise."""


@dataclass(frozen=True)
class Verdict:
    """A guard's decision, verified.

    Attributes:
        action: one of `ACTIONS`, or "invalid": no reply of the guard followed from the policy. That is never allow;
            whoever acts on it asks a person, and counts it apart.
        decision: the last reply, as far as it could be read.
        faults: what was wrong with the last reply; empty where the action is valid.
        replies: as they came, decisions as JSON; the last one decided.
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
        guard: any object with `reply`. A `RemoteGuard` has its timeout for all tries together.
        prompt: what is asked for, 1 to `LONGEST` characters.
        audit: where the verdict is recorded.
        retries: how often more it is asked where a reply does not follow from the policy, at least 0.

    Raises:
        ValueError: the prompt is empty, too long or no Unicode, or the guard cannot read it or the policy whole, or
            its reply is neither a `Decision` nor a `Reply`, or `retries` is negative.
        ConnectionError: the guard does not answer.
        GuardError: the guard's code fails in another way, or its name or id is no text.
        OSError: the verdict cannot be recorded.
    """
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}")
    if not prompt.strip() or len(prompt) > LONGEST:
        raise ValueError(f"expected a prompt of 1 to {LONGEST} characters, got {len(prompt)}: {prompt[:40]!r}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"expected a prompt in Unicode, got halves of characters: {prompt[:40]!r}")
    guard_id = "" if audit is None else check_text(guard, "id")  # before anything is asked that could not be recorded
    with guard_errors(check_text(guard, "name")):
        deadline = time.monotonic() + guard.timeout if is_remote(guard) else None
    replies, start = [], time.perf_counter()
    for number in range(1 + retries):
        if number and deadline is not None and time.monotonic() >= deadline:
            break
        reply, decision, faults = _ask(policy, guard, prompt, deadline)
        faults = [" ".join(replace_halves(fault).split()) for fault in faults]
        replies.append(reply)
        if not faults:
            break
    seconds = round(time.perf_counter() - start, 4)
    action = "invalid" if faults or decision is None else decision.action
    verdict = Verdict(action, decision, tuple(faults), tuple(replies), seconds)
    if audit is not None:
        audit.write(policy.sha256, guard_id, prompt, replies, verdict.action, verdict.clauses, faults)
    return verdict


def is_remote(guard: Guard) -> TypeGuard[RemoteGuard]:
    """Tell whether a guard keeps to a deadline."""
    return hasattr(guard, "reply_before")


@contextmanager
def guard_errors(name: str) -> Iterator[None]:
    """Turn errors of somebody else's code into GuardError, except those that a guard may raise."""
    try:
        yield
    except (ValueError, OSError, ImportError, KeyboardInterrupt, GuardError):
        raise
    except BaseException as error:  # SystemExit, too: its code must not become the command's
        raise GuardError(f"the guard {name} failed: {type(error).__name__}: {error}") from error


def check_text(guard: object, attribute: str) -> str:
    """Return a guard's name or id; GuardError where it is no text."""
    with guard_errors(type(guard).__name__):
        value = getattr(guard, attribute)
        if not isinstance(value, str):
            raise TypeError(f"expected its {attribute} as a text, got {type(value).__name__}")
        return value


def _ask(policy: Policy, guard: Guard, prompt: str, deadline: float | None) -> tuple[str, Decision | None, list[str]]:
    """Return a guard's reply as a text, what it decided, as far as that can be read, and what is wrong with it."""
    try:
        with guard_errors(guard.name):
            if deadline is not None and is_remote(guard):
                reply = guard.reply_before(policy, prompt, deadline)
            else:
                reply = guard.reply(policy, prompt)
    except UnusableReplyError as error:
        return replace_halves(error.text), None, [str(error)]
    if isinstance(reply, Reply) and isinstance(reply.text, str) and isinstance(reply.nonce, str):
        text = replace_halves(reply.text)
        return text, *read_reply(policy, text, reply.nonce, prompt)
    if not isinstance(reply, Decision):
        raise ValueError(
            f"expected a Decision or a Reply from the guard {guard.name}, got {type(reply).__name__}: docs/safety.md "
            "shows a guard"
        )
    try:
        decision = Decision.from_fields({name: getattr(reply, name) for name in FIELDS})
    except ValueError as error:
        return "", None, [str(error)]
    return decision.to_json(), decision, verify(policy, decision)
