"""Files that others may have written or may be reading: read with limits, written in one step, and their hashes."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

# Bytes of the largest image or file of text that is read, and levels within levels of JSON.
LARGEST = 1 << 28
DEEPEST = 32
# Seconds after which a temporary file has lost the process that wrote it.
LEFT_OVER = 86400


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file that anybody may have written, to read its bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no file but a pipe, a device or a folder, which might never end.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    handle = os.open(path, sum(flags, os.O_RDONLY))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"expected a file at {path}, got a pipe, a device or a folder; move it away")
    return os.fdopen(handle, "rb")


def read_regular(path: str | Path, most: int = LARGEST) -> bytes:
    """Read a file of at most `most` bytes; see `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"expected at most {most} bytes in {path}, got {size}; move it away")
        return file.read(most)


def read_json(path: str | Path) -> Any:
    """Read JSON that anybody may have written; see `read_regular`.

    Raises:
        ValueError: also where it is none, or nested more deeply than anything that is written here.
    """
    try:
        document = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got what cannot be read ({error})") from error
    within = [document]
    for _ in range(DEEPEST):
        within = [
            inner
            for value in within
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if within:
        raise ValueError(f"expected JSON in {path} of at most {DEEPEST} levels, got more; move it away")
    return document


def canonical_json(document: Any) -> str:
    """Write JSON in the one form this package uses: sorted keys, real characters, no NaN or infinity."""
    return json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with `sha256`, a digest of all else that it holds; see `check_seal`."""
    values = {key: value for key, value in document.items() if key != "sha256"}
    return {**values, "sha256": hashlib.sha256(canonical_json(values).encode()).hexdigest()}


def check_seal(document: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError, which names the file, where a document no longer holds what was `sealed`."""
    if "sha256" not in document:
        raise ValueError(
            f"expected a document with a digest of what it holds, got none in {path}: it is of an earlier "
            "version; make it again"
        )
    try:
        whole = sealed(document)["sha256"] == document["sha256"]
    except ValueError:  # NaN, or halves of characters: nothing of the kind is written
        whole = False
    if not whole:
        raise ValueError(
            f"expected what was written into {path}, got other values: it was edited or is damaged; make it again"
        )


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file so that readers see the old content or the new, never a part."""
    return write_bytes(path, text.encode())


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left in a folder: the files and folders of a name, a day after their last change."""
    for left in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime < LEFT_OVER:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file so that readers see the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f".{glob.escape(path.name)}.*.tmp")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # mkstemp makes the file private; a result should have the permissions of any new file
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, document: Any) -> Path:
    """Write a JSON document atomically: sorted keys, indented, NaN and infinity refused with ValueError."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    return write_text(path, text + "\n")


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ContentHashes:
    """Content hashes of files, remembered as long as a file's size and its times of change stay.

    A file that changed within the last second is hashed again every time: it may change once more within one tick of
    the file system's clock.

    Args:
        file: where they are kept between processes, a line each with a digest of its own; it is appended to, and can be
            deleted at any time. Lines that are damaged are left out with a warning. None remembers them in this object
            alone.
    """

    SETTLED = 1e9  # nanoseconds

    def __init__(self, file: str | Path | None = None) -> None:
        self._file = None if file is None else Path(file)

    @cached_property
    def _known(self) -> dict[tuple[str | int, ...], str]:
        known, damaged = {}, 0
        if self._file and self._file.is_file():
            for line in self._file.read_bytes().split(b"\n"):
                values, _, check = line.rpartition(b" ")
                if check.decode("ascii", "replace") == _line_digest(values):
                    *key, digest = json.loads(values)
                    known[tuple(key)] = digest
                else:
                    damaged += bool(line)
        if damaged:
            log.warning("%s: %d damaged lines are left out: those files are hashed again", self._file, damaged)
        return known

    def __call__(self, path: str | Path) -> str:
        """Return `content_hash(path)`."""
        status = os.stat(path)
        # the time of the inode's change cannot be set back, as that of the content is by `cp -p`
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in self._known:
            digest = content_hash(path)
            if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < self.SETTLED:
                return digest
            self._known[key] = digest
            if self._file:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                values = json.dumps([*key, digest]).encode()
                with open(self._file, "ab") as file:
                    file.write(values + b" " + _line_digest(values).encode() + b"\n")
        return self._known[key]


def _line_digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


# For folders that are asked about without a cache: hashed once a process.
remembered_hash = ContentHashes()
