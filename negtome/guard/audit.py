"""What was decided, by whom, under which policy: one line a verdict, appended, never rewritten."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path


class Audit:
    """A file of verdicts, JSON, one a line. Several processes may append to one.

    Args:
        path: of the file; it and its folders are made when first written.
        text: whether prompts and replies are kept as text beside their hashes; they may be personal.
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
        """Append a verdict: time (UTC), policy, guard, hashes of prompt and replies, action, clauses, faults."""
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "policy_sha256": policy_sha256,
            "guard": guard_id,
            "prompt_sha256": _sha256(prompt),
            "reply_sha256": [_sha256(reply) for reply in replies],
            "action": action,
            "clauses": list(clauses),
            # what came instead is the reply's own text
            "faults": [fault if self.text else fault.split(", got ")[0] for fault in faults],
            **({"prompt": prompt, "replies": list(replies)} if self.text else {}),
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            written = os.write(descriptor, line)  # in one piece, at the end, whoever else appends
            os.fsync(descriptor)
            if written < len(line):
                raise OSError(f"expected room for {len(line)} bytes in {self.path}, got {written}: free some")
        finally:
            os.close(descriptor)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
