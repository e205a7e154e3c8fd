"""Read files that other programs may have written, write files in one step, and hash them."""

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

# The largest text file that is read, in bytes.
LARGEST = 1 << 28
# A temporary file of this age, in seconds, belongs to a process that was killed.
LEFT_OVER = 86400
# A file that changed less than this many nanoseconds ago may change again within the same tick of the clock.
SETTLED = 1e9


def read_regular(path: str | Path, most: int = LARGEST) -> bytes:
    """Read a file; raise ValueError if it has more than `most` bytes, or is a pipe or a device that may never end."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"expected a file at {path}, got a pipe, a device or a folder; move it away")
    if size > most:
        raise ValueError(f"expected at most {most} bytes in {path}, got {size}; move it away")
    return path.read_bytes()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise a ValueError that names the file if the content is not JSON."""
    try:
        return json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got what cannot be read ({error})") from error


def canonical_json(document: Any, indent: int | None = None, compact: bool = False) -> str:
    """Return JSON text that is equal for equal documents: keys are sorted, NaN and infinity raise ValueError.

    Args:
        document: any JSON value.
        indent: spaces per level; None for one line.
        compact: write ASCII without spaces, the form whose hash is a run's id.
    """
    return json.dumps(
        document,
        sort_keys=True,
        ensure_ascii=compact,
        allow_nan=False,
        indent=indent,
        separators=(",", ":") if compact else None,
    )


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with the key `sha256`: a digest of all other keys, which `verify_checksum` verifies."""
    values = {key: value for key, value in document.items() if key != "sha256"}
    return {**values, "sha256": hashlib.sha256(canonical_json(values).encode()).hexdigest()}


def verify_checksum(document: Mapping[str, Any], path: str | Path) -> None:
    """Raise a ValueError that names the file if a document no longer agrees with its `sha256`."""
    try:
        intact = with_checksum(document)["sha256"] == document.get("sha256")
    except ValueError:  # NaN or a lone surrogate, which are never written
        intact = False
    if not intact:
        raise ValueError(
            f"expected what was written into {path}, got other values: it was edited, is damaged or of an earlier "
            "version; make it again"
        )


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a metric's document; raise a ValueError that names the file if it is damaged or something else."""
    document = read_json(path)
    if not isinstance(document, dict) or not {"metric", "groups"} <= document.keys():
        raise ValueError(f"expected a metric's document in {path}, got other JSON; delete it and measure again")
    verify_checksum(document, path)
    return document


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically; see `write_bytes`."""
    return write_bytes(path, text.encode())


def sweep(folder: Path, pattern: str) -> None:
    """Remove the files and folders that match a pattern and did not change for a day: killed processes left them."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime < LEFT_OVER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically: readers see the old content or the new content, never a part."""
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
    """Write indented `canonical_json` atomically."""
    return write_text(path, canonical_json(document, indent=1) + "\n")


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled_status(path: str | Path) -> tuple[int, int, int] | None:
    """Return a file's size and times, which stay equal as long as the file does; None if it changed just now."""
    status = os.stat(path)
    # `cp -p` sets the time of the content back, but not the time of the inode's change
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cached_hash(path: str | Path) -> str:
    """Return `content_hash(path)`; the file is read again only after its size or times changed."""
    status = settled_status(path)
    return content_hash(path) if status is None else _hash(os.path.abspath(path), *status)


@functools.cache
def _hash(path: str, *status: int) -> str:
    return content_hash(path)
