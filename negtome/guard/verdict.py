"""From a prompt to an action: ask a guard, verify its reply, ask once more, write a record."""

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
    """Raised if a guard's own code fails: there is no verdict, and the request must not count as allowed."""


class Guard(Protocol):
    """An object that decides requests.

    Attributes:
        name: in tables.
        id: changes with everything that affects its decisions: weights, thresholds, model, address.
    """

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str: ...

    def reply(self, policy: Policy, prompt: str) -> Decision | Reply:
        """Return a decision, or the reply of a language model with the nonce of its request.

        Raises:
            UnusableReplyError: there is no usable reply, which makes the verdict invalid.
            ValueError: the policy or the prompt is too long.
            ConnectionError: the guard does not answer.
        """


class RemoteGuard(Guard, Protocol):
    """A guard behind a network.

    Attributes:
        timeout: seconds for all tries of one decision.
    """

    @property
    def timeout(self) -> float: ...

    def reply_before(self, policy: Policy, prompt: str, deadline: float) -> Decision | Reply:
        """Return as `reply` does, before `time.monotonic()` reaches the deadline; ConnectionError otherwise."""


@dataclass(frozen=True)
class Verdict:
    """A guard's decision, verified.

    Attributes:
        action: one of `ACTIONS`, or "invalid": no reply of the guard followed from the policy. Treat it as escalate,
            never as allow, and count it separately.
        decision: of the last reply; None if it could not be read.
        faults: of the last reply; empty if the action is valid.
        replies: texts, or decisions as JSON; the last one counts.
        seconds: of the guard.
    """

    action: str
    decision: Decision | None
    faults: tuple[str, ...]
    replies: tuple[str, ...]
    seconds: float

    @property
    def clauses(self) -> tuple[str, ...]:
        """The cited ids; none for an invalid verdict."""
        return () if self.action == "invalid" or self.decision is None else self.decision.clauses

    @property
    def quote(self) -> str:
        """The quoted words of the policy; "" without a citation, and for an invalid verdict."""
        return "" if self.action == "invalid" or self.decision is None else self.decision.quote

    @property
    def reason(self) -> str:
        """The reason in one line, for the user."""
        if self.action == "invalid":
            return f"the guard's reply did not follow from the policy: {self.faults[0]}"
        return f"the policy says: {' '.join(self.quote.split())}" if self.quote else "no clause of the policy applies"


def decide(policy: Policy, guard: Guard, prompt: str, audit: Audit | None = None, retries: int = 1) -> Verdict:
    """Let a guard decide a prompt by a policy.

    Args:
        policy: from `read_policy`.
        guard: any object with `reply`. A `RemoteGuard` has its timeout for all tries together.
        prompt: 1 to `LONGEST` characters.
        audit: records the verdict.
        retries: number of further tries if a reply does not follow from the policy, at least 0.

    Raises:
        ValueError: the prompt is empty, too long or no Unicode, or the guard cannot read it or the policy, or the reply
            is neither a `Decision` nor a `Reply`, or `retries` is negative.
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
    guard_id = "" if audit is None else check_text(guard, "id")  # before a request that could not be recorded
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
    """Return whether a guard takes a deadline."""
    return hasattr(guard, "reply_before")


@contextmanager
def guard_errors(name: str, kind: str = "guard") -> Iterator[None]:
    """Turn errors of the code of a guard, or of an image check, into GuardError, except the kinds that it may raise."""
    try:
        yield
    except (ValueError, OSError, ImportError, KeyboardInterrupt, GuardError):
        raise
    except BaseException as error:  # also SystemExit, whose code must not become the command's
        raise GuardError(f"the {kind} {name} failed: {type(error).__name__}: {error}") from error


def check_text(guard: object, attribute: str) -> str:
    """Return a guard's name or id; GuardError if it is no text."""
    with guard_errors(type(guard).__name__):
        value = getattr(guard, attribute)
        if not isinstance(value, str):
            raise TypeError(f"expected its {attribute} as a text, got {type(value).__name__}")
        return value


def _ask(policy: Policy, guard: Guard, prompt: str, deadline: float | None) -> tuple[str, Decision | None, list[str]]:
    """Return a guard's reply as a text, its decision (None if it cannot be read), and its faults."""
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
