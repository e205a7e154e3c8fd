"""Locks between processes that a crash cannot leave behind: they end with the process that holds them.

They save work, not correctness: whatever is written appears by one atomic rename, with or without a lock. So where a
file system has no locks (some network file systems), the work goes on without.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

#: How a file system that has no locks answers.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock for the length of a `with` block.

    Args:
        path: the lock's file, the same for all that share the lock; it is made if needed, stays, and is empty.
        wait: whether to wait for another process that holds it.

    Yields:
        Whether the lock is held. False only without `wait`: another process has it.
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
