"""Folders and zip files: the images in them, and their bytes."""

import os
import stat
import zipfile
import zlib
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from flowmaps.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 6], ...]}, as EDM and StyleGAN prepare data
READ_ERRORS = (OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def _is_image(name: str) -> bool:
    """Tell images by their suffix; the shadow files that macOS adds to folders and zip files do not count."""
    file = name.rpartition("/")[2]
    stem, _, suffix = file.rpartition(".")
    shadow = file.startswith("._") or "/__MACOSX/" in f"/{name}"
    return bool(stem) and f".{suffix.lower()}" in SUFFIXES and not shadow


class FileSource(Protocol):
    """A folder or a zip file."""

    @property
    def root(self) -> Path: ...

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return the image files, each with its size and time, which reveal a change, and the names of all others."""

    def read(self, name: str) -> bytes:
        """Return the content of one file."""


@dataclass(frozen=True)
class Folder:
    """All files under ``root``; links are followed, except back to a folder above."""

    root: Path

    def listing(self) -> tuple[dict[str, str], list[str]]:
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
            if stat.S_ISDIR(seen.st_mode):
                real = os.path.realpath(entry.path)
                if real in above:
                    left_out.append(f"{name} (a link back to {real})")
                else:
                    self._walk(f"{name}/", (*above, real), found, left_out)
            elif not stat.S_ISREG(seen.st_mode):
                left_out.append(f"{name} (a broken link or not a file)")
            elif _is_image(name):
                found[name] = f"{seen.st_size} {seen.st_mtime_ns}"
            elif entry.name != LABELS:
                left_out.append(name)

    def read(self, name: str) -> bytes:
        with open(f"{self.root}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 (a Path takes as long as the read)
            return file.readall()


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
                self._open[os.getpid()] = zipfile.ZipFile(self.root)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.root} is not a readable zip file ({error}): create it again") from None
        return self._open[os.getpid()]

    def listing(self) -> tuple[dict[str, str], list[str]]:
        seen = self.root.stat()
        found: dict[str, str] = {}
        left_out = []
        for entry in sorted((e for e in self._archive().infolist() if not e.is_dir()), key=lambda e: e.filename):
            if _is_image(entry.filename):
                found[entry.filename] = f"{entry.file_size} {seen.st_size} {seen.st_mtime_ns}"
            elif PurePosixPath(entry.filename).name != LABELS:
                left_out.append(entry.filename)
        return found, left_out

    def read(self, name: str) -> bytes:
        return self._archive().read(name)
