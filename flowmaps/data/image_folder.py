"""Images in a folder or a zip file: found, checked once, labelled, and decoded when asked for."""

import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from flowmaps.data.image_io import BadImage, decode, square, with_channels
from flowmaps.errors import UserError
from flowmaps.files import cache_directory, write_file

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 6], ...]}, as EDM and StyleGAN prepare data


READ_ERRORS = (OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def _is_image(name: str) -> bool:
    """By its suffix; the shadow files that macOS puts into folders and zip files are none."""
    path = PurePosixPath(name)
    shadow = path.name.startswith("._") or "__MACOSX" in path.parts
    return path.suffix.lower() in SUFFIXES and not shadow


class Source(Protocol):
    """Where files are."""

    @property
    def root(self) -> Path: ...

    def listing(self) -> tuple[dict[str, list[int]], list[str]]:
        """Image files with what tells a changed file (sizes, times), and what else is there."""

    def read(self, name: str) -> bytes:
        """Content of one file."""


@dataclass(frozen=True)
class Folder:
    """All files under ``root``, links followed but not in circles."""

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
                left_out.append(f"{name} (a broken link or no file)")
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
    _open: dict[int, zipfile.ZipFile] = field(default_factory=dict, compare=False)  # by process: forks share an offset

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_open": {}}

    def _archive(self) -> zipfile.ZipFile:
        if os.getpid() not in self._open:
            try:
                self._open[os.getpid()] = zipfile.ZipFile(self.root)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.root} is no readable zip file ({error}): make it again") from None
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


@dataclass(frozen=True)
class ImageFiles:
    """A data set of image files, decoded at each visit; ``size`` None keeps them as they are, all of one shape."""

    source: Source
    names: list[str]
    channels: int
    size: int | None = None
    label: Tensor | None = None
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # what is in the source but not in the data set, with reasons

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.channels, self.size, self.size) if self.size else tuple(self._image(self.names[0]).shape)

    def _image(self, name: str) -> Tensor:
        try:
            pixels = with_channels(decode(self.source.read(name)), self.channels)
        except (BadImage, *READ_ERRORS) as error:
            raise UserError(f"{self.source.root}: {name} was whole and is not now ({error}): put it back") from None
        return torch.from_numpy(np.array(square(pixels, self.size) if self.size else pixels)).permute(2, 0, 1)

    def file_of(self, item: int) -> str:
        """The file that an item is read from."""
        return f"{self.source.root}/{self.names[item]}"

    def digest(self) -> str:
        """SHA-256 over names and labels in order."""
        labels = None if self.label is None else self.label.tolist()
        return hashlib.sha256(json.dumps([self.names, labels, self.classes, self.shape]).encode()).hexdigest()

    def content(self) -> str:
        """SHA-256 over the files' bytes in order and what is made of them: reads all, decodes none."""
        digest = hashlib.sha256(json.dumps([self.channels, self.size]).encode())
        for name in self.names:
            digest.update(hashlib.sha256(self.source.read(name)).digest())
        return digest.hexdigest()

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images at ``index`` [b] as uint8 [b, C, H, W], with their labels."""
        names = [self.names[i] for i in index.tolist()]
        images = [self._image(name) for name in names]
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{self.source.root}: {name} has shape {tuple(image.shape)}, {names[0]} has "
                    f"{tuple(images[0].shape)}: crop and resize them to one size (stats.py --size=64)"
                )
        return torch.stack(images), None if self.label is None else self.label[index]


def open_images(root: Path, size: int | None = None, skip_corrupt: bool = False) -> ImageFiles:
    """The images under a folder or in a zip file, every one decoded once to see that it is whole.

    Labels are those of dataset.json if it is there, else the names of the first folders that differ, in order of name;
    none if an image lies outside such a folder. What is left out is said on stderr. Raises ``UserError`` that names
    the files that are no whole images, unless they are to be skipped.
    """
    source, found, left_out = find_images(root, "--config.data.root, --data")
    bad, channels = _checked(source, found)
    if bad and not skip_corrupt:
        raise UserError(
            f"{root} has {len(bad)} files that are no whole images: {_some(bad)}: repair or remove them, or leave "
            "them out (--config.data.skip_corrupt, stats.py --skip_corrupt)"
        )
    names = [name for name in found if name not in bad]
    if not names:
        raise UserError(f"{root} has no whole image: {_some(bad)}")
    left_out = [*(f"{name} ({reason})" for name, reason in bad.items()), *_summary(left_out)]
    if left_out:
        tqdm.write(f"{root}: {len(names)} images; left out: {', '.join(left_out)}", file=sys.stderr)
    label, classes = find_labels(source, names)
    return ImageFiles(source, names, channels, size, label, classes, tuple(left_out))


def find_images(root: Path, flag: str) -> tuple[Source, dict[str, list[int]], list[str]]:
    """The folder or zip file ``root``, which ``flag`` names, its image files, and what else is in it; none is read."""
    if not root.exists():
        raise UserError(f"{root}: no such folder or zip file of images ({flag})")
    source: Source = Folder(root) if root.is_dir() else Zip(root)
    found, left_out = source.listing()
    if not found:
        raise UserError(f"{root} has no images ({', '.join(sorted(SUFFIXES))})")
    return source, found, left_out


def find_labels(source: Source, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels int64 [n] of the images ``names`` and the names of the classes; (None, ()) without labels."""
    label, classes = _labels(source, names)
    return None if label is None else torch.tensor([label[name] for name in names]), classes


def _summary(other: list[str], most: int = 20) -> list[str]:
    """What is no image: all of it by name, or counts by suffix if there is much."""
    if len(other) <= most:
        return [name if name.endswith(")") else f"{name} (no image by its suffix)" for name in other]
    suffixes = Counter(PurePosixPath(name).suffix or "no suffix" for name in other)
    return [f"{count} files with {suffix}" for suffix, count in suffixes.most_common(most)]


def _some(bad: dict[str, str], most: int = 20) -> str:
    shown = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:most])
    return shown + (f" and {len(bad) - most} more" if len(bad) > most else "")


def _checked(source: Source, found: dict[str, list[int]]) -> tuple[dict[str, str], int]:
    """Which files are no whole images, and why; and 1 if all others are grey, else 3. Remembered for unchanged files.

    The memory is a small file in the cache directory, keyed by names, sizes and times.
    """
    key = hashlib.sha256(json.dumps([1, PIL.__version__, str(source.root.resolve()), found]).encode()).hexdigest()
    cache = cache_directory() / f"{key}.json"
    try:
        known = json.loads(cache.read_text())
        return dict(known["bad"]), int(known["channels"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    bad, channels, names = {}, 1, list(found)

    unsure: list[str] = []  # a file that could not be opened today may be opened tomorrow

    def look(name: str) -> int | str:
        try:
            return int(decode(source.read(name)).shape[-1])
        except (BadImage, *READ_ERRORS) as error:
            if isinstance(error, OSError):
                unsure.append(name)
            return str(error)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(names), desc="checking images", unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(names), 1024):
            chunk = names[start : start + 1024]
            for name, result in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(result, str):
                    bad[name] = result
                else:
                    channels = max(channels, result)
            bar.update(len(chunk))
    try:
        if unsure:
            return bad, channels
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_file(cache, json.dumps({"bad": bad, "channels": channels}).encode())
    except OSError:  # only a memory: without it the next start looks again
        pass
    return bad, channels


def _labels(source: Source, names: list[str]) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Label of each image and the names of the classes; (None, ()) without labels.

    Folders that all images share, such as the one that ``zip -r`` puts in front, are looked through.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    depth = 0
    while all(len(parts) > depth and parts[depth] == folders[0][depth] for parts in folders):
        depth += 1
    for level in range(depth + 1):
        prefix = "".join(f"{part}/" for part in folders[0][:level])
        try:
            content = source.read(prefix + LABELS)
        except (FileNotFoundError, IsADirectoryError, KeyError):
            continue
        except READ_ERRORS as error:
            raise UserError(f"{source.root}/{prefix}{LABELS} cannot be read ({error}): write it again") from None
        return _listed_labels(content, f"{source.root}/{prefix}{LABELS}", names, prefix)
    tops = [parts[depth] if len(parts) > depth else "" for parts in folders]
    classes = tuple(sorted(set(tops)))
    if "" in classes or len(classes) < 2:
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return {name: number[top] for name, top in zip(names, tops, strict=True)}, classes


def _listed_labels(
    content: bytes, file: str, names: list[str], prefix: str
) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """The labels that a dataset.json gives to ``names``, which it lists without ``prefix``."""
    try:
        listed = json.loads(content)["labels"]
        if listed is None:
            return None, ()
        known = {prefix + str(name): value for name, value in listed}
        label = {name: known[name] for name in names}
        for name, value in label.items():
            if type(value) is not int or not 0 <= value < 1_000_000:
                raise ValueError(f"{value!r} of {name} is no whole number from 0 on")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"nothing for {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{file} must hold 'labels', a list of [name, number] for each image, or null for none ({reason})"
        ) from None
    return label, tuple(str(i) for i in range(max(label.values()) + 1))
