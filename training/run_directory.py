"""Protection of a run directory: nothing of the user's is replaced, one run at a time, one-line errors of the disk."""

import dataclasses
import errno
import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flowmaps.errors import UserError
from flowmaps.export import MODEL
from flowmaps.files import Layout, is_ours, writable_directory
from flowmaps.reading import parse, read_bytes, read_json
from flowmaps.run_weights import list_checkpoints
from training.checkpoint import CHECKPOINT
from training.config import Config, Decay, plain

FILES, DIRECTORIES = (".lock", "config.json", "log.jsonl"), ("model", "samples", "checkpoints", "snapshots", "tb")
SNAPSHOT = re.compile(r"step-\d{8,}\.safetensors")
LOCK = re.compile(rb"process \d+ on ")  # what .lock says
EARLIER = b'"derivative_precision"'  # in each config.json, also of versions that did not mark it
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def check_run_directory(workdir: Path) -> None:
    """Refuse, before any work, a ``workdir`` where the run would replace, or meet, what no run wrote.

    Raises:
        UserError: The message names it; nothing has been changed.
    """
    writable_directory(workdir)
    for name in (*FILES, *DIRECTORIES):
        path, kind = workdir / name, "file" if name in FILES else "directory"
        there = path.exists() or path.is_symlink()
        if there and not (path.is_file() if name in FILES else path.is_dir()):
            raise UserError(f"{path} is not a {kind}, and a run has one there: choose another directory")
        if there and not os.access(path, os.W_OK):
            raise UserError(f"{path} is read-only: fix this, or choose another directory")
    lock = workdir / ".lock"
    if lock.is_file() and lock.stat().st_size and not LOCK.match(read_bytes(lock)):
        raise UserError(f"{lock} is not the lock of a run: choose another directory")
    if not is_run(workdir):
        for name in (*FILES[1:], *DIRECTORIES):
            if _has_content(workdir / name):
                raise UserError(f"has {name}, which no run of flowmaps wrote: choose another directory")
    MODEL.check(workdir / "model")
    CHECKPOINT.check(workdir / "checkpoints" / "best")


def is_run(workdir: Path) -> bool:
    """Return whether ``workdir`` has the config or a checkpoint of a run."""
    config = workdir / "config.json"
    if config.is_file() and (is_ours(config) or EARLIER in read_bytes(config)):
        return True
    states = [path / CHECKPOINT.sign for path in list_checkpoints(workdir)]
    return any(state.is_file() and CHECKPOINT.mark in read_bytes(state) for state in states)


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(not file.is_dir() for file in path.rglob("*"))
    return path.exists() and path.stat().st_size > 0


def remove(directory: Path, layout: Layout) -> None:
    """Delete a directory of ``layout``, unless it has other files too."""
    with suppress(UserError):
        layout.check(directory)
        shutil.rmtree(directory, ignore_errors=True)


def remove_stale(workdir: Path) -> None:
    """Delete the best model and the snapshots of a run that left no checkpoint."""
    remove(workdir / "checkpoints" / "best", CHECKPOINT)
    for file in (workdir / "snapshots").glob("*"):
        if SNAPSHOT.fullmatch(file.name) and file.is_file():
            file.unlink()


def prune_checkpoints(workdir: Path, keep: int) -> None:
    """Delete all but the last ``keep`` checkpoints; the best one is neither counted nor deleted."""
    for old in list_checkpoints(workdir)[:-keep]:
        remove(old, CHECKPOINT)


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
    """Say of an error of the disk inside the block that the run can go on; others are left to ``flowmaps.cli.run``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        code = int(rust[1]) if rust else getattr(error, "errno", None)
        file = getattr(error, "filename", None)
        inside = isinstance(file, (str, os.PathLike)) and workdir.absolute() in Path(file).absolute().parents
        if code is None or not (inside or (file is None and code in DISK_ERRORS)):
            raise
        raise UserError(
            f"cannot be written ({os.strerror(code)}): fix this and rerun the same command; it resumes from the last "
            "checkpoint",
            field="workdir",
            value=workdir,
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a run from its config.json, with the digests of what it began with under "origin"."""
    remedy = "cannot tell whether the run is the same, use a new workdir"
    stored = parse(dict[str, Any], read_json(path, remedy), str(path))
    stored["origin"] = parse(dict[str, str], stored.get("origin", {}), f"{path}: origin")
    return stored


def check_same_config(config: Config, path: Path) -> None:
    """Refuse to resume a run whose config.json would have made other steps."""
    stored = read_config(path)
    stored = {key: value for key, value in stored.items() if key not in ("origin", "written_by")}
    objective = stored.get("objective")
    if isinstance(objective, dict) and objective.get("times") == "gap" and "diagonal_draw" not in objective:
        raise UserError(
            f"draws other times now than the run in {path.parent}: use a new workdir", "objective.times", "gap"
        )
    stored = _with_defaults(stored, _defaults(config))
    allowed = config.resumable_fields() | {f"objective.{name}" for name in config.objective.idle()}
    if config.optim.decay in (Decay.constant, Decay.inverse_sqrt):  # the others depend on the number of steps
        allowed.add("steps")
    changed = [key for key in differences(stored, config.to_dict()) if key not in allowed]
    if changed:
        remedy = "use its value or a new workdir"
        if not changed[0].startswith("network"):
            remedy += f", there with init_from={path.parent} to start from the averaged weights of this run"
        raise UserError(f"differs from the run in {path.parent}: {remedy}", field=changed[0])


def _defaults(section: Any) -> dict[str, Any]:
    """Return what stands in for fields that an older config.json does not have: their value then, or the default."""
    found = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            found[f.name] = _defaults(value)
        elif f.init and f.default is not dataclasses.MISSING:
            found[f.name] = plain(f.metadata.get("before", f.default))
    return found


def _with_defaults(stored: Any, defaults: dict[str, Any]) -> Any:
    if not isinstance(stored, dict):
        return stored  # a difference
    found = defaults | stored
    nested = {k: _with_defaults(found[k], v) for k, v in defaults.items() if isinstance(v, dict) and k in stored}
    return found | nested


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for k in sorted(a.keys() | b.keys()) for d in differences(a.get(k), b.get(k), f"{prefix}.{k}".strip("."))
        ]
    return [] if a == b else [prefix]
