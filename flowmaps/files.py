"""Atomic writes of files and directories that never replace what flowmaps did not write.

A new file or directory is written under a temporary name next to its target, flushed, and renamed. What is there before
is replaced only if it carries flowmaps' mark (``WRITTEN_BY``); everything else is the user's and refused by name.
"""

import contextlib
import ctypes
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flowmaps.errors import UserError

WRITTEN_BY = "written_by"  # key of JSON objects and archives, and text in pictures and pages, with the value below
WRITER = "flowmaps"
MARK = re.compile(rb"written_by(\.npy|\W{1,6}flowmaps\b)|tEXtSoftware\0flowmaps")
_ENDS = 1 << 16  # bytes at either end of a file among which the mark is
_numbers = itertools.count()


@dataclass(frozen=True)
class Layout:
    """The directories of one kind that flowmaps writes: a file that shows it, and the names of all files in them."""

    sign: str  # a file that each has
    mark: bytes  # in the content of that file
    names: tuple[str, ...]  # patterns of fnmatch for paths relative to the directory

    def check(self, path: Path) -> None:
        """Refuse a ``path`` that exists and holds what flowmaps did not write there."""
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path} is not a directory: choose another name")
        if Path.cwd().is_relative_to(path.resolve()):
            raise UserError(f"{path} is the current directory, or has it inside: give the name of a new directory")
        files: list[Path] = []
        folders: list[Path] = []
        for entry in path.rglob("*"):
            if fnmatch.fnmatchcase(entry.name, ".flowmaps-*.tmp"):  # being written
                continue
            (folders if entry.is_dir() and not entry.is_symlink() else files).append(entry)
        if files and not ((path / self.sign).is_file() and self.mark in _ends(path / self.sign)):
            raise UserError(f"{path} has files that flowmaps did not write ({files[0].name}): choose another directory")
        above = [parent.as_posix() for pattern in self.names for parent in PurePosixPath(pattern).parents]
        for kind, entries, patterns in (("file", files, self.names), ("folder", folders, above)):
            for name in (entry.relative_to(path).as_posix() for entry in entries):
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    raise UserError(
                        f"{path} has a {kind} that flowmaps did not write ({name}): move it, or choose another"
                    )


def is_ours(path: Path) -> bool:
    """Return whether the file has the mark of one that flowmaps wrote, or is empty."""
    return path.is_file() and (not path.stat().st_size or bool(MARK.search(_ends(path))))


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return start + file.read(_ENDS)


def check_new_file(path: Path) -> Path:
    """Check, before any work, that ``write_file`` may and can write ``path``; return it with links followed."""
    target = _replaceable(path)
    writable_directory(target.parent)
    return target


def _replaceable(path: Path) -> Path:
    """Return ``path`` with links followed; refuse one that exists and is not a writable file of flowmaps' own."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a file name")
    target = path.resolve()
    if target.exists() and not (target.is_file() and is_ours(target)):
        raise UserError(f"{path} exists and flowmaps did not write it: choose another name or remove it")
    if target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"{path} is read-only: choose another name")
    return target


def write_file(path: Path, content: bytes, check: bool = True) -> None:
    """Write a file atomically by ``new_file``."""
    with new_file(path, check) as beside:
        beside.write_bytes(content)


def write_json(path: Path, values: Any) -> None:
    """Write JSON by ``write_file``, marked as flowmaps' own; numbers that JSON does not have become null."""
    write_file(path, to_json(values))


def to_json(values: Any) -> bytes:
    """Return marked JSON: "written_by" in the object, or in the first one of a list."""
    values = finite(values)
    objects = [values] if isinstance(values, dict) else values
    if objects and isinstance(objects[0], dict):
        objects = [{WRITTEN_BY: WRITER, **objects[0]}, *objects[1:]]
    marked = objects[0] if isinstance(values, dict) else objects
    return (json.dumps(marked, indent=2, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """Return JSON values with null in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_file(path: Path, check: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` when the block ends without an error.

    Args:
        path: The target; a link is followed.
        check: Whether to refuse an existing file that flowmaps did not write. False for a file whose directory is
            known to be flowmaps' own, such as the config.json of a run.

    Raises:
        UserError: There is a file that flowmaps did not write.
    """
    target = _replaceable(path) if check else path
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _temporary(target)
    try:
        yield beside
        _sync(beside)
        beside.replace(target)
        _sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, layout: Layout) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``path`` when the block ends without an error.

    Raises:
        UserError: ``path`` has something that flowmaps did not write as a directory of this ``layout``.
    """
    if _old(path).exists() and not path.exists():  # killed between the two renames of _exchange
        _old(path).rename(path)
    layout.check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _temporary(path)
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
        _sync(beside)
        layout.check(path)  # again: the block may have taken hours
        _exchange(beside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def lock_later(directory: Path, seconds: float = 60) -> Iterator[Callable[[], None]]:
    """Yield a function that takes the lock of ``directory``, which other processes' writers hold for moments.

    It is held until the block ends, and the system drops it however the process ends. Without locks on that system,
    and if it is not free within ``seconds``, the block goes on without it.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        yield lambda: None
        return

    def acquire() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                return None

    try:
        yield acquire
    finally:
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``, which becomes ``new`` if it exists; atomically on Linux."""
    if not path.exists():
        with contextlib.suppress(OSError):  # another process was first
            new.rename(path)
            return
    if not _swap(new, path):
        path.rename(_old(path))
        new.rename(path)
        _old(path).rename(new)


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths in one step if the system can."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(library.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return bool(library.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0)  # RENAME_EXCHANGE
    except (OSError, AttributeError):
        return False


def _temporary(path: Path) -> Path:
    """Return a new temporary name next to ``path``, after removing those that killed processes of this host left."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    for leftover in path.parent.glob(f".flowmaps-{host}-*.tmp"):
        pid = leftover.name.split("-")[2]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.parent / f".flowmaps-{host}-{os.getpid()}-{next(_numbers)}.tmp"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_directory(path: Path) -> Path:
    """Check that ``path`` is, or can be made, a directory in which files can be written. Makes none."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing} is not a directory: choose another path")
    try:
        probe = _temporary(existing / "x")
        probe.touch()
        probe.unlink()
        (path / "x").exists()  # a name that is too long
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another directory") from None
    return path


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_directory() -> Path:
    """Return the directory of things that can be computed again: ~/.cache/flowmaps, or under XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path.home can raise)
    return Path(home) / "flowmaps"
