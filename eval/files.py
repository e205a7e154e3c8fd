"""Files that others may have written or may be reading: read with limits, written in one step, and their hashes."""

import functools
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Bytes of the largest file of text that is read.
LARGEST = 1 << 28
# Seconds after which a temporary file has lost the process that wrote it.
LEFT_OVER = 86400
# Nanoseconds after which a file that did not change keeps its times: it may change twice within one tick of the clock.
SETTLED = 1e9


def read_regular(path: str | Path, most: int = LARGEST) -> bytes:
    """Read a file that anybody may have written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more than `most` bytes, or is a pipe or a device, which might never end.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"expected a file at {path}, got a pipe, a device or a folder; move it away")
    if size > most:
        raise ValueError(f"expected at most {most} bytes in {path}, got {size}; move it away")
    return path.read_bytes()


def read_json(path: str | Path) -> Any:
    """Read JSON that anybody may have written; ValueError, which names the file, where it is none."""
    try:
        return json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got what cannot be read ({error})") from error


def canonical_json(document: Any, indent: int | None = None, compact: bool = False) -> str:
    """Write JSON so that equal documents give equal text: sorted keys, no NaN or infinity.

    Args:
        document: what to write.
        indent: spaces a level; None for one line.
        compact: whether to write ASCII without spaces, the form whose hash is a run's id.

    Raises:
        ValueError: NaN or infinity is in the document.
    """
    return json.dumps(
        document,
        sort_keys=True,
        ensure_ascii=compact,
        allow_nan=False,
        indent=indent,
        separators=(",", ":") if compact else None,
    )


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with `sha256`, a digest of all else that it holds; see `check_seal`."""
    values = {key: value for key, value in document.items() if key != "sha256"}
    return {**values, "sha256": hashlib.sha256(canonical_json(values).encode()).hexdigest()}


def check_seal(document: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError, which names the file, where a document no longer holds what was `sealed`."""
    try:
        whole = sealed(document)["sha256"] == document.get("sha256")
    except ValueError:  # NaN, or halves of characters: nothing of the kind is written
        whole = False
    if not whole:
        raise ValueError(
            f"expected what was written into {path}, got other values: it was edited, is damaged or of an earlier "
            "version; make it again"
        )


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a metric's document.

    Raises:
        ValueError: it is none, or holds other values than were written; the message names it.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not {"metric", "groups"} <= document.keys():
        raise ValueError(f"expected a metric's document in {path}, got other JSON; delete it and measure again")
    check_seal(document, path)
    return document


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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, document: Any) -> Path:
    """Write `canonical_json`, indented, so that readers see the old content or the new, never a part."""
    return write_text(path, canonical_json(document, indent=1) + "\n")


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled_status(path: str | Path) -> tuple[int, int, int] | None:
    """Return the size and times by which a file is known not to have changed; None if it changed just now."""
    status = os.stat(path)
    # the time of the inode's change cannot be set back, as that of the content is by `cp -p`
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remembered_hash(path: str | Path) -> str:
    """Return `content_hash(path)`, read again only when its size or times of change are others."""
    status = settled_status(path)
    return content_hash(path) if status is None else _hash(os.path.abspath(path), *status)


@functools.cache
def _hash(path: str, *status: int) -> str:
    return content_hash(path)
