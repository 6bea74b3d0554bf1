"""Sources of image files, and two of them: folders and zip files."""

import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.reading import regular_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 6], ...]}, as EDM and StyleGAN prepare data
READ_ERRORS = (OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
LARGEST_FILE = 1 << 28  # bytes of an image file or of the labels
SYSTEM_FOLDERS = {  # of network drives, macOS and Windows, for deleted files, copies and thumbnails
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@sharebin",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "recycler",
    "system volume information",
}


def is_hidden(name: str) -> bool:
    """Tell hidden files and folders, and those of the system, by a name without slashes."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_image(name: str) -> bool:
    """Tell images by the suffix; a name that is hidden, such as .png, must have been left out before."""
    return name.lower().endswith(SUFFIXES)


class FileSource(Protocol):
    """A folder, a zip file, or anything else that has images as files, by name."""

    @property
    def root(self) -> Path: ...

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return the image files, each with what reveals a change of it, and the names of all others.

        Hidden folders and those of the system are among the others, without what is in them.
        """

    def read(self, name: str) -> bytes:
        """Return the content of one file of at most ``LARGEST_FILE`` bytes."""


@runtime_checkable
class Labelled(Protocol):
    """A source that has the labels of its images, rather than folders of classes or a dataset.json."""

    def labels(self, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
        """Return labels int64 [n] of the images ``names`` and the names of the classes; (None, ()) without labels."""


@dataclass(frozen=True)
class Folder:
    """All files under ``root``; links are followed, except back to a folder above."""

    root: Path

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return images with their sizes and times."""
        found: dict[str, str] = {}
        left_out: list[str] = []
        self._walk("", (os.path.realpath(self.root),), found, left_out)
        return found, left_out

    def _walk(self, folder: str, above: tuple[str, ...], found: dict[str, str], left_out: list[str]) -> None:
        """List ``folder``, "" or a name with a slash at its end; with one look at each path, for folders of many."""
        try:
            with os.scandir(self.root / folder) as entries:
                ordered = sorted(entries, key=attrgetter("name"))
        except OSError as error:
            left_out.append(f"{folder.rstrip('/') or '.'} ({error.strerror})")
            return
        for entry in ordered:
            name = folder + entry.name
            try:
                seen = entry.stat()
            except OSError:
                left_out.append(f"{name} (a broken link or not a file)")
                continue
            if is_hidden(entry.name):
                left_out.append(f"{name} (hidden)")
            elif stat.S_ISDIR(seen.st_mode):
                real = os.path.realpath(entry.path)
                if real in above:
                    left_out.append(f"{name} (a link back to {real})")
                else:
                    self._walk(f"{name}/", (*above, real), found, left_out)
            elif not stat.S_ISREG(seen.st_mode):
                left_out.append(f"{name} (a broken link or not a file)")
            elif _is_image(entry.name):
                found[name] = f"{seen.st_size} {seen.st_mtime_ns}"
            elif entry.name != LABELS:
                left_out.append(name)

    def read(self, name: str) -> bytes:
        file = os.open(f"{self.root}/{name}", os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for
        try:
            seen = os.fstat(file)
            if not stat.S_ISREG(seen.st_mode):
                raise IsADirectoryError if stat.S_ISDIR(seen.st_mode) else OSError("a pipe or a device, not a file")
            check_size(seen.st_size)
            content = os.read(file, seen.st_size + 1)
            while len(content) < seen.st_size and (more := os.read(file, seen.st_size - len(content))):
                content += more
            return content
        finally:
            os.close(file)


def check_size(size: int) -> None:
    """Refuse a file of more than ``LARGEST_FILE`` bytes."""
    if size > LARGEST_FILE:
        raise RuntimeError(f"{size:,} bytes, more than {LARGEST_FILE:,}")


@dataclass(frozen=True)
class Zip:
    """All files in the zip file ``root``."""

    root: Path
    _open: dict[int, zipfile.ZipFile] = field(
        default_factory=dict, compare=False
    )  # by process, since forks share the offset

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_open": {}}

    def _archive(self) -> zipfile.ZipFile:
        if os.getpid() not in self._open:
            try:
                self._open[os.getpid()] = zipfile.ZipFile(regular_file(self.root))
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{self.root} is not a readable zip file ({error}): create it again") from None
        return self._open[os.getpid()]

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return images with their sizes and checksums, and the zip file's own size and time."""
        seen = self.root.stat()
        found: dict[str, str] = {}
        left_out: dict[str, None] = {}  # a hidden folder once
        for entry in sorted((e for e in self._archive().infolist() if not e.is_dir()), key=lambda e: e.filename):
            name = entry.filename
            if hidden := _hidden_part(name.split("/")):
                left_out[f"{hidden} (hidden)"] = None
            elif _is_image(name):
                found[name] = f"{entry.file_size} {entry.CRC:08x} {seen.st_size} {seen.st_mtime_ns}"
            elif PurePosixPath(name).name != LABELS:
                left_out[name] = None
        return found, list(left_out)

    def read(self, name: str) -> bytes:
        archive = self._archive()
        check_size(archive.getinfo(name).file_size)
        return archive.read(name)


def _hidden_part(parts: Iterable[str]) -> str:
    """Return the path up to its first hidden part, or "" without one."""
    above = ""
    for part in parts:
        if is_hidden(part):
            return above + part
        above += f"{part}/"
    return ""
