"""Requests that a person decides: a folder with one file for each, and a chained record of every step.

A ticket is open until somebody decides it, once: allow or refuse. An allowed request makes images only after its
release. A release is for exactly this request under this policy: another prompt, size or policy is another request.

The folder is trusted: anybody who can write there can release a request. It is made for its owner alone.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from negtome.guard.audit import LOCK_WAIT, Audit

#: States of a ticket, in their order.
STATES = ("open", "allowed", "refused", "released")
#: Decisions of a person, with the state that they lead to.
DECISIONS = {"allow": "allowed", "refuse": "refused"}
#: Digits of a ticket's id: the first ones of the request's hash.
DIGITS = 16
#: The file of the queue's steps; see `negtome.guard.audit`.
STEPS = "audit.jsonl"


class QueueFullError(RuntimeError):
    """Raised if a queue has its largest number of open tickets."""


@dataclass(frozen=True)
class Ticket:
    """A request that a person decides.

    Attributes:
        request_sha256: of the request and the policy; the id is its beginning.
        request: the request's fields as JSON values, with the prompt's text.
        policy_sha256, guard: that escalated it.
        action: "escalate", or "invalid".
        clauses: ids that the guard cited.
        reason: of the guard, in one line.
        created: time (UTC).
        state: one of `STATES`.
        by, decided: who decided, and when; "" before.
    """

    request_sha256: str
    request: Mapping[str, Any]
    policy_sha256: str
    guard: str
    action: str
    clauses: tuple[str, ...]
    reason: str
    created: str
    state: str = "open"
    by: str = ""
    decided: str = ""

    @property
    def id(self) -> str:
        """The id of the ticket, and of its file."""
        return self.request_sha256[:DIGITS]


class Queue:
    """A folder of tickets that several processes may use.

    Args:
        folder: made, for its owner alone, by the first ticket.
        limit: most open tickets.
    """

    def __init__(self, folder: str | Path, limit: int = 1000) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.audit = Audit(self.folder / STEPS)

    def find(self, request_sha256: str) -> Ticket | None:
        """Return the ticket of a request; None if there is none.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._path(request_sha256[:DIGITS])
        if not path.is_file():
            return None
        ticket = _read(path)
        if ticket.request_sha256 != request_sha256:
            raise ValueError(f"{path} belongs to another request: move it away")
        return ticket

    def get(self, name: str) -> Ticket:
        """Return the ticket with an id; errors are those of `find`, and ValueError if there is none."""
        path = self._path(name)
        if not path.is_file():
            raise ValueError(f"no ticket {name} in {self.folder}: list shows the ids")
        return _read(path)

    def tickets(self, state: str | None = None) -> list[Ticket]:
        """Return the tickets, all or those of a state, the oldest first."""
        pattern = "[0-9a-f]" * DIGITS + ".json"
        tickets = [_read(path) for path in self.folder.glob(pattern)]
        return sorted((one for one in tickets if state in (None, one.state)), key=lambda one: (one.created, one.id))

    def add(self, ticket: Ticket) -> Ticket:
        """Add a ticket, unless its request has one already. Return the one in the queue.

        Raises:
            QueueFullError: there are `limit` open tickets.
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock():
            present = self.find(ticket.request_sha256)
            if present is not None:
                return present
            if len(self.tickets("open")) >= self.limit:
                raise QueueFullError(f"the queue has {self.limit} open requests: decide some")
            self._store(ticket, "queued")
        return ticket

    def decide(self, name: str, decision: str, by: str) -> Ticket:
        """Decide an open ticket, once.

        Args:
            name: id of the ticket.
            decision: "allow" or "refuse".
            by: name of the person.

        Raises:
            ValueError: there is no such ticket, or it is decided already, or the name is empty.
        """
        if not by.strip():
            raise ValueError("expected the name of the person who decides, got none: add --by NAME")
        with self._lock():
            ticket = self.get(name)
            if ticket.state != "open":
                raise ValueError(f"{name} is {ticket.state} already, by {ticket.by}: a request is decided once")
            decided = replace(ticket, state=DECISIONS[decision], by=" ".join(by.split()), decided=_now())
            return self._store(decided, decided.state)

    def release(self, name: str) -> Ticket:
        """Release an allowed ticket: from now on, its request makes images.

        Raises:
            ValueError: there is no such ticket, or nobody allowed it.
        """
        with self._lock():
            ticket = self.get(name)
            if ticket.state != "allowed":
                raise ValueError(f"{name} is {ticket.state}: only an allowed request can be released")
            return self._store(replace(ticket, state="released"), "released")

    def _path(self, name: str) -> Path:
        if not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", name):
            raise ValueError(f"a ticket's id has {DIGITS} hexadecimal digits, got {name[:40]!r}")
        return self.folder / f"{name}.json"

    def _lock(self) -> FileLock:
        if not self.folder.is_dir():
            raise ValueError(f"no queue at {self.folder}: negtome serve --queue makes one for its first escalation")
        return _ClearLock(self.folder / ".lock", mode=0o600, timeout=LOCK_WAIT)

    def _store(self, ticket: Ticket, step: str) -> Ticket:
        """Record a step, and then write the ticket's file completely or not at all."""
        fields = {"ticket": ticket.id, "request_sha256": ticket.request_sha256, "policy_sha256": ticket.policy_sha256}
        self.audit.record({"step": step, **fields, "by": ticket.by})
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".ticket-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(ticket), file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(ticket.id))
        except BaseException:
            os.unlink(temporary)
            raise
        return ticket


class _ClearLock(FileLock):
    """A lock whose error says what to do."""

    def acquire(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().acquire(*arguments, **options)
        except Timeout as error:
            raise TimeoutError(f"another process holds {self.lock_file} for {LOCK_WAIT:g} s: try again") from error


def new_ticket(
    request_sha256: str,
    request: Mapping[str, Any],
    policy_sha256: str,
    guard: str,
    action: str,
    clauses: Sequence[str],
    reason: str,
) -> Ticket:
    """Return an open ticket with the time; the arguments are those of `Ticket`."""
    return Ticket(request_sha256, dict(request), policy_sha256, guard, action, tuple(clauses), reason, _now())


def _read(path: Path) -> Ticket:
    """Return the ticket in a file; ValueError if it is damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        ticket = Ticket(**{**fields, "clauses": tuple(fields["clauses"])})
        if ticket.id != path.stem or ticket.state not in STATES or not isinstance(ticket.request, dict):
            raise ValueError("its fields do not fit")
        return ticket
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): move it away") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
