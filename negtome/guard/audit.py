"""A record of verdicts: one line for each, appended and never rewritten."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

#: Seconds to wait for another process that writes; writing a record takes milliseconds.
LOCK_WAIT = 10.0


class Audit:
    """A file of verdicts in JSON lines, to which several processes may append; the lock is PATH.lock.

    A record is written completely or not at all. An unfinished line of another program stays, on a line of its own.

    Args:
        path: the file; it and its folders are made by the first record.
        text: whether to keep the texts of prompts and replies, which may be personal, beside their hashes.
    """

    def __init__(self, path: str | Path, text: bool = False) -> None:
        self.path = Path(path)
        self.text = text

    def write(
        self,
        policy_sha256: str,
        guard_id: str,
        prompt: str,
        replies: Sequence[str],
        action: str,
        clauses: Sequence[str],
        faults: Sequence[str],
    ) -> None:
        """Append a verdict with the time (UTC).

        Raises:
            OSError: the record cannot be written, or another process keeps the file locked for `LOCK_WAIT` seconds.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "policy_sha256": policy_sha256,
            "guard": guard_id,
            "prompt_sha256": _sha256(prompt),
            "reply_sha256": [_sha256(reply) for reply in replies],
            "action": action,
            "clauses": list(clauses),
            # after ", got " comes the reply's own text
            "faults": [fault if self.text else fault.split(", got ")[0] for fault in faults],
        }
        if self.text:
            row |= {"prompt": prompt, "replies": list(replies)}
        try:
            with FileLock(f"{self.path}.lock", mode=0o600, timeout=LOCK_WAIT):
                self._append((json.dumps(row, ensure_ascii=False) + "\n").encode())
        except Timeout as error:
            raise TimeoutError(f"expected to write into {self.path}, got its lock held for {LOCK_WAIT:g} s") from error

    def _append(self, line: bytes) -> None:
        """Append a line completely, or leave the file as it was."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end:
                os.lseek(descriptor, end - 1, os.SEEK_SET)
                if os.read(descriptor, 1) != b"\n":  # the last writer was killed
                    line = b"\n" + line
            try:
                written = os.write(descriptor, line)
                os.fsync(descriptor)
                if written < len(line):
                    raise OSError(f"expected room for {len(line)} bytes in {self.path}, got {written}: free some")
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
