"""Protection of a run directory: one run at a time, and one-line errors when it cannot be written."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flowmaps.errors import UserError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
RUST = "(os error"  # part of safetensors' messages about them


@contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Hold the lock of the run in ``workdir`` inside the block.

    It is a POSIX record lock, which also holds across hosts on a shared file system, which the system drops however
    the process ends, and which forked data workers do not inherit. ``filelock`` uses ``flock``: a data worker that
    outlives its killed parent would keep that lock.

    Raises:
        UserError: Another process, on any host, holds the lock; the message names it.
    """
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{file.read().strip()} trains there: wait for it, stop it, or use a new workdir",
                field="workdir",
                value=workdir,
            ) from None
        except OSError as error:
            print(f"warning: {workdir} cannot be locked ({error.strerror}): start one run there only", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turn errors of a full, broken or read-only disk inside the block into a ``UserError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, file = getattr(error, "errno", None), getattr(error, "filename", None)
        elsewhere = file is not None and workdir.absolute() not in Path(file).absolute().parents
        if elsewhere or (code not in DISK_ERRORS and RUST not in str(error)):
            raise
        reason = os.strerror(code) if code else str(error)
        raise UserError(
            f"cannot be written ({reason}): fix this and rerun the same command; it resumes from the last checkpoint",
            field="workdir",
            value=workdir,
        ) from None
