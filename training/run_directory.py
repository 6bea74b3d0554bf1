"""What keeps a run directory whole: one run at a time in it, and plain words when it cannot be written."""

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
RUST = "(os error"  # in what safetensors says of them


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the lock of the run in ``workdir`` inside the block; refused while another process does, on any host.

    A POSIX record lock, which the system drops however its process ends and which forked data workers do not have.
    """
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"--workdir={workdir}: {file.read().strip()} trains there: wait for it, stop it, or use a new --workdir"
            ) from None
        except OSError as error:
            print(f"warning: {workdir} cannot be locked ({error.strerror}): see that one run is there", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """A full, broken or read-only disk inside the block ends it with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, file = getattr(error, "errno", None), getattr(error, "filename", None)
        elsewhere = file is not None and workdir.absolute() not in Path(file).absolute().parents
        if elsewhere or (code not in DISK_ERRORS and RUST not in str(error)):
            raise
        reason = os.strerror(code) if code else str(error)
        raise UserError(
            f"--workdir={workdir} cannot be written ({reason}): mend that and give the same command again, which goes "
            "on from the last checkpoint"
        ) from None
