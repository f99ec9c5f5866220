"""The operating system's lock on an open file, which dies with its process; and what is done where there is none."""

import errno
import fcntl
import sys
from typing import IO

# Of a file system without: Lustre as it is mounted by default, NFS 3 whose server runs no lockd.
NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK


def flock(file: IO, how: int, risk: str) -> None:
    """`fcntl.flock`; on a file system that has no locks only a line, on stderr, of what is risked without.

    Raises:
        BlockingIOError: another process holds it, and `how` is not to wait.
        OSError: as of any file.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{file.name}: no lock can be had there ({error.strerror}), so {risk}", file=sys.stderr, flush=True)
