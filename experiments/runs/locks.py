"""Locks between processes, which end with the process that holds them, even if it is killed.

They only save work: all files appear by one atomic rename, with or without a lock. On a file system without locks, such
as some network file systems, the work goes on without them.
"""

import contextlib
import errno
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

#: Errors of a file system without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock for the length of a `with` block.

    Args:
        path: the lock's file, an empty file that is created if needed and stays.
        wait: whether to wait for another process that holds the lock.

    Yields:
        Whether this process holds the lock; always True with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            # A soft lock, filelock's answer to ENOSYS, would outlive a process that is killed.
            held.enter_context(FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False))
        except Timeout:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield True


def has_locks(folder: Path) -> bool:
    """Tell whether a folder's file system refuses a lock that another handle holds; the folder is created if needed."""
    path = folder / f".lock-{uuid.uuid4().hex}"
    try:
        with locked(path), locked(path, wait=False) as is_locked_twice:
            return not is_locked_twice
    finally:
        path.unlink(missing_ok=True)
