"""Folders and zip files: the images in them, and their bytes."""

import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from flowmaps.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 6], ...]}, as EDM and StyleGAN prepare data
READ_ERRORS = (OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def _is_image(name: str) -> bool:
    """Tell images by their suffix; the shadow files that macOS adds to folders and zip files do not count."""
    path = PurePosixPath(name)
    shadow = path.name.startswith("._") or "__MACOSX" in path.parts
    return path.suffix.lower() in SUFFIXES and not shadow


class FileSource(Protocol):
    """A folder or a zip file."""

    @property
    def root(self) -> Path: ...

    def listing(self) -> tuple[dict[str, list[int]], list[str]]:
        """Return the image files with sizes and times, which reveal a change, and the names of all other files."""

    def read(self, name: str) -> bytes:
        """Return the content of one file."""


@dataclass(frozen=True)
class Folder:
    """All files under ``root``; links are followed, except back to a folder above."""

    root: Path

    def listing(self) -> tuple[dict[str, list[int]], list[str]]:
        found: dict[str, list[int]] = {}
        left_out: list[str] = []
        self._walk(self.root, (os.path.realpath(self.root),), found, left_out)
        return found, left_out

    def _walk(self, folder: Path, above: tuple[str, ...], found: dict[str, list[int]], left_out: list[str]) -> None:
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            left_out.append(f"{folder.relative_to(self.root).as_posix()} ({error.strerror})")
            return
        for path in paths:
            name = path.relative_to(self.root).as_posix()
            if path.is_dir():
                real = os.path.realpath(path)
                if real in above:
                    left_out.append(f"{name} (a link back to {real})")
                else:
                    self._walk(path, (*above, real), found, left_out)
            elif not path.is_file():
                left_out.append(f"{name} (a broken link or not a file)")
            elif _is_image(name):
                stat = path.stat()
                found[name] = [stat.st_size, stat.st_mtime_ns]
            elif path.name != LABELS:
                left_out.append(name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


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

    def listing(self) -> tuple[dict[str, list[int]], list[str]]:
        stat = self.root.stat()
        found, left_out = {}, []
        for entry in sorted((e for e in self._archive().infolist() if not e.is_dir()), key=lambda e: e.filename):
            if _is_image(entry.filename):
                found[entry.filename] = [entry.file_size, stat.st_size, stat.st_mtime_ns]
            elif PurePosixPath(entry.filename).name != LABELS:
                left_out.append(entry.filename)
        return found, left_out

    def read(self, name: str) -> bytes:
        return self._archive().read(name)
