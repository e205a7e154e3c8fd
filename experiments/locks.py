"""Locks between processes that a crash cannot leave behind: the kernel frees them with the process that held them.

They save work, not correctness: whatever is written appears by one atomic rename, with or without a lock. So where a
file system knows no locks (some network file systems; Windows), the work goes on without.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: What a file system answers that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that the file `path` stands for; the file is made if needed, stays, and is empty.

    Args:
        path: the lock's file; whoever names the same file means the same lock.
        wait: whether to wait for another process that holds it.

    Yields:
        Whether the lock is held. False only without `wait`: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield True
