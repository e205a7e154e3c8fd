"""A record of verdicts: lines of JSON, chained by hashes, appended by several processes and never rewritten.

Every record has its line number and the SHA-256 of the line before it. `check_chain` finds lines that were edited,
removed, inserted or reordered. It cannot see that the last lines were cut off, unless you keep the last hash elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

#: Seconds to wait for another process that writes; writing a record takes milliseconds.
LOCK_WAIT = 10.0
#: What stands for the hash of a line before the first one.
START = "0" * 64
#: Bytes that are read at once when the end of the file is looked for.
BLOCK = 1 << 16


class Audit:
    """A file of records in JSON lines, to which several processes may append; the lock is PATH.lock.

    A record is written completely or not at all. An unfinished line of a killed process stays, on a line of its own.

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
            OSError: as `record`.
        """
        row = {
            "policy_sha256": policy_sha256,
            "guard": guard_id,
            "prompt_sha256": text_sha256(prompt),
            "reply_sha256": [text_sha256(reply) for reply in replies],
            "action": action,
            "clauses": list(clauses),
            # after ", got " comes the reply's own text
            "faults": [fault if self.text else fault.split(", got ")[0] for fault in faults],
        }
        if self.text:
            row |= {"prompt": prompt, "replies": list(replies)}
        self.record(row)

    def record(self, fields: Mapping[str, Any]) -> None:
        """Append JSON values with the time (UTC), the line's number and the hash of the line before.

        Raises:
            OSError: the record cannot be written, or another process keeps the file locked for `LOCK_WAIT` seconds.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        try:
            with FileLock(f"{self.path}.lock", mode=0o600, timeout=LOCK_WAIT):
                self._append(row)
        except Timeout as error:
            raise TimeoutError(f"expected to write into {self.path}, got its lock held for {LOCK_WAIT:g} s") from error

    def _append(self, row: Mapping[str, Any]) -> None:
        """Append a record completely, or leave the file as it was."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            lines, finished = _last_lines(descriptor, end)
            number, previous = _next_link(lines)
            chained = {"number": number, "previous": previous, **row}
            line = ("" if finished else "\n") + json.dumps(chained, ensure_ascii=False) + "\n"
            data = line.encode()
            try:
                written = os.write(descriptor, data)
                os.fsync(descriptor)
                if written < len(data):
                    raise OSError(f"expected room for {len(data)} bytes in {self.path}, got {written}: free some")
            except BaseException:  # also an interrupt, which must not leave half a line
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def _last_lines(descriptor: int, end: int) -> tuple[list[bytes], bool]:
    """Return the lines of a file back to its last chained record, or all, and whether the last line is finished."""
    data, start = b"", end
    while start:
        start = max(0, start - BLOCK)
        data = os.pread(descriptor, min(BLOCK, end - start - len(data)), start) + data
        lines = data.removesuffix(b"\n").split(b"\n")
        complete = lines if start == 0 else lines[1:]
        for index in range(len(complete) - 1, -1, -1):
            if _chained(complete[index]) is not None:
                return complete[index:], data.endswith(b"\n")
    return (data.removesuffix(b"\n").split(b"\n") if data else []), not data or data.endswith(b"\n")


def _next_link(lines: Sequence[bytes]) -> tuple[int, str]:
    """Return the number and the hash with which the next record continues these lines."""
    if not lines:
        return 1, START
    first = _chained(lines[0])
    return len(lines) + (1 if first is None else first[0]), _sha256(lines[-1])


def _chained(line: bytes) -> tuple[int, str] | None:
    """Return the number of a chained record and the hash of the line before it; None for another line."""
    row = _json(line)
    if not isinstance(row, dict):
        return None
    number, previous = row.get("number"), row.get("previous")
    return (number, previous) if type(number) is int and isinstance(previous, str) else None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class ChainReport:
    """The state of an audit file.

    Attributes:
        records: number of chained records.
        unchained: number of lines before the first chained record, which the chain does not protect.
        unfinished: number of later lines that are no record, left by killed processes.
        head: hash of the last line, to be kept elsewhere; `START` for an empty file.
        fault: the first break, with its line and kind; "" if there is none.
    """

    records: int
    unchained: int
    unfinished: int
    head: str
    fault: str


def check_chain(path: str | Path, head: str | None = None) -> ChainReport:
    """Check every line of an audit file against the line before it.

    A chain starts at the first chained record; it covers the content of the line before that, and no earlier one.

    Args:
        path: of the file.
        head: a hash that an earlier report gave. Its line must still be there, or else the end was cut off or edited.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an audit file at {path}, got no file")
    data = path.read_bytes()
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    links, hashes = [_chained(line) for line in lines], [_sha256(line) for line in lines]
    first = next((index for index, link in enumerate(links) if link is not None), len(lines))
    fault = _first_break(lines, links, hashes, first)
    if not fault and head is not None and head not in [*hashes, START]:
        fault = f"cut off, or edited at the end: no line has the hash {head[:64]}"
    records = sum(link is not None for link in links)
    unfinished = len(lines) - first - records
    return ChainReport(records, first, unfinished, hashes[-1] if hashes else START, fault)


def _first_break(
    lines: Sequence[bytes], links: Sequence[tuple[int, str] | None], hashes: Sequence[str], first: int
) -> str:
    """Return the first break of a chain, in words; "" if there is none."""
    places = {link[0]: index for index, link in reversed([*enumerate(links)]) if link is not None}
    for index in range(first, len(lines)):
        link, line = links[index], index + 1
        if link is None:
            if _json(lines[index]) is not None:
                return f"line {line} was inserted, or edited: it is no chained record"
            continue  # unfinished, and covered by the next record's hash
        number, previous = link
        if number != line:
            # The record that belongs here may have been moved to another line.
            kind = "removed" if number > line and line not in places else "reordered"
            if kind == "removed":
                return f"records were removed before line {line}: it has the number {number}"
            moved = "inserted" if places[number] < index else kind
            return f"line {line} was {moved}: it has the number {number}"
        if previous != (hashes[index - 1] if index else START):
            return f"{_edited_line(links, hashes, index)} was edited: its hash does not fit"
    return ""


def _edited_line(links: Sequence[tuple[int, str] | None], hashes: Sequence[str], index: int) -> str:
    """Return which line was edited, where a line's hash of the line before it does not fit."""
    line, following = index + 1, links[index + 1] if index + 1 < len(links) else None
    if index == 0:
        return "line 1"
    if following is None:
        return f"line {line - 1} or {line}"
    return f"line {line - 1}" if following == (line + 1, hashes[index]) else f"line {line}"


def text_sha256(text: str) -> str:
    """Return the digest of a text, 64 digits."""
    return _sha256(text.encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
