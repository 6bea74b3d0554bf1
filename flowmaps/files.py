"""Atomic writes of files and directories (written to a temporary name, flushed, renamed), and .npz files."""

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowmaps.errors import UserError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` atomically."""
    with new_file(path) as beside:
        beside.write_bytes(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` when the block ends without an error."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``path`` when the block ends without an error."""
    beside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # killed between the two renames below
        old.replace(path)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
        _sync(beside)
        if path.exists():
            path.replace(old)
        beside.replace(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def writable_directory(path: Path) -> Path:
    """Create the directory ``path`` if it does not exist and check that a file can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another directory") from None
    return path


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable_file(path: Path) -> Path:
    """Check, before any work, that the file ``path`` can be written."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a file name")
    writable_directory(path.parent)
    return path


@contextmanager
def _opened_npz(path: str | Path, remedy: str) -> Iterator[Any]:
    """Open an .npz without unpickling; errors name the file and end with ``remedy``."""
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        KeyError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path} is not a readable .npz ({error}): {remedy}") from None


def read_npz(path: str | Path, remedy: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return the arrays of an .npz, all or those among ``keys``; a damaged file is refused with ``remedy``."""
    with _opened_npz(path, remedy) as archive:
        return {key: archive[key] for key in archive.files if keys is None or key in keys}


def npz_shapes(path: str | Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the arrays in an .npz from their headers alone, since they may be large."""
    shapes = {}
    with _opened_npz(path, remedy) as archive:
        for entry in archive.zip.namelist():
            with archive.zip.open(entry) as array:
                version = np.lib.format.read_magic(array)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shapes[entry.removesuffix(".npy")] = tuple(read(array)[0])
    return shapes


def cache_directory() -> Path:
    """Return the directory of things that can be computed again: ~/.cache/flowmaps, or under XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path.home can raise)
    return Path(home) / "flowmaps"
