"""Image files of any source: listed, checked once, labelled, and decoded on demand."""

import errno
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowmaps.data.dataset import Batch, DataSet, named
from flowmaps.data.file_source import LABELS, READ_ERRORS, SUFFIXES, FileSource, Folder, Labelled, Zip
from flowmaps.data.image_check import check_images, some
from flowmaps.data.image_io import (
    BACKGROUNDS,
    FITS,
    LARGEST_SIDE,
    BadImage,
    Pixels,
    decode,
    in_threads,
    squared,
    with_channels,
)
from flowmaps.data.tables import open_table
from flowmaps.data.tars import open_tars
from flowmaps.errors import UserError, choose, shorten
from flowmaps.info import MOST_CLASSES
from flowmaps.reading import parse_json, regular_file

PREFIXES = ("hf", "wds")  # before a colon and the address of a Hugging Face dataset, or of WebDataset shards


@dataclass(frozen=True)
class ImageFiles(DataSet):
    """A data set of image files, decoded at each visit; without ``size`` they need one shape.

    ``fit``, one of ``FITS``, makes them square. ``background``, one of ``BACKGROUNDS``, is behind transparent pixels
    and around padded images.
    """

    source: FileSource
    names: list[str]
    channels: int
    size: int | None = None
    label: Tensor | None = None
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # in the source but not in the data set, with reasons
    sha256: str = ""  # over the contents of the files in order
    fit: str = "crop"
    background: str = "white"

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return named(self.classes)

    @property
    def class_shares(self) -> tuple[float, ...]:
        counts = [] if self.label is None else self.label.bincount(minlength=self.num_classes).tolist()
        return tuple(count / len(self) for count in counts) if len(set(counts)) > 1 else ()

    @property
    def name(self) -> str:
        return self.source.root.name

    @property
    def crop(self) -> str:
        added = "" if self.background == "white" else f", over {self.background}"
        return f"{FITS[self.fit]}, exact mean over areas{added}" if self.size else f"none{added}"

    @property
    def shape(self) -> tuple[int, ...]:
        side = (self.size, self.size) if self.size else self._image(self.names[0]).shape[:2]
        return (self.channels, *side)

    def _image(self, name: str) -> Pixels:
        try:
            pixels = with_channels(decode(self.source.read(name), background=self.background), self.channels)
            return squared(pixels, self.size, self.fit, self.background) if self.size else pixels
        except (BadImage, *READ_ERRORS) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not the file's fault
                raise
            raise UserError(
                f"{self.source.root}: {name} is now unreadable ({error}) although it passed the check at start-up: "
                "restore it"
            ) from None

    def file_of(self, item: int) -> str:
        """Return the file that an item is read from."""
        return f"{self.source.root}/{self.names[item]}"

    def digest(self) -> str:
        """Return a SHA-256 over names, labels and contents of the files in order."""
        labels = None if self.label is None else self.label.tolist()
        facts = [self.names, labels, self.classes, self.shape, self.sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def content(self) -> str:
        """Return a SHA-256 over the files' contents in order, channels and size."""
        facts = [self.channels, self.size, self.sha256]
        if (self.fit, self.background) != ("crop", "white"):
            facts += [self.fit, self.background]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def fetch(self, index: Tensor) -> Batch:
        names = [self.names[i] for i in index.tolist()]
        threads = min(torch.get_num_threads(), len(names) // 8)  # one thread in a process that reads ahead
        images = [image.transpose(2, 0, 1) for image in in_threads(self._image, names, threads)]
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{self.source.root}: {name} has shape {image.shape}, {names[0]} has {images[0].shape}: crop and "
                    "resize them to one size, e.g. size=64"
                )
        x = np.stack(images, out=np.empty((len(images), *images[0].shape), np.uint8))  # channels first in memory too
        return torch.from_numpy(x), None if self.label is None else self.label[index]


def open_images(
    root: str | Path,
    size: int | None = None,
    skip_corrupt: bool = False,
    fit: str = "crop",
    background: str = "white",
) -> ImageFiles:
    """Open the images of a source; each is decoded once to check that it is intact.

    The source ``root`` is a folder, a zip file, ``hf:`` with what ``open_table`` takes, or ``wds:`` with what
    ``open_tars`` takes. Labels of a folder or zip file come from dataset.json if it exists, else from the names of the
    first folders that differ, in alphabetical order; there are none if an image lies outside such a folder. Files left
    out, also hidden ones and the folders of the system, are named on stderr. For the others see ``ImageFiles``.

    Raises:
        UserError: Some files are not intact images, and ``skip_corrupt`` is off; the message names them.
    """
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise UserError(f"must lie in 1 .. {LARGEST_SIDE:,}", field="size", value=size)
    for name, value, choices in (("fit", fit, FITS), ("background", background, BACKGROUNDS)):
        if value not in choices:
            raise UserError(choose(value, choices), field=name, value=value)
    source, found, left_out = find_images(root)
    checked = check_images(source, found)
    bad = checked.bad
    if bad and not skip_corrupt:
        raise UserError(
            f"{root} has {len(bad)} files that are not intact images: {some(bad)}: repair or remove them, or set "
            "skip_corrupt to leave them out"
        )
    names = [name for name in found if name not in bad]
    if not names:
        raise UserError(f"{root} has no intact image: {some(bad)}")
    left_out = [*(f"{shorten(name)} ({reason})" for name, reason in bad.items()), *summary(left_out)]
    if left_out:
        tqdm.write(f"{root}: {len(names)} images; left out: {', '.join(left_out)}", file=sys.stderr)
    label, classes = find_labels(source, names)
    facts = (checked.channels, size, label, classes, tuple(left_out), checked.sha256)
    return ImageFiles(source, names, *facts, fit, background)


def find_images(root: str | Path) -> tuple[FileSource, dict[str, str], list[str]]:
    """Return the source ``root``, its image files and its other files; none of them is read."""
    source = _source(root)
    found, left_out = source.listing()
    if not found:
        others = f"; left out: {', '.join(summary(left_out))}" if left_out else ""
        raise UserError(f"{root} has no images ({', '.join(SUFFIXES)}){others}")
    return source, found, left_out


def _source(root: str | Path) -> FileSource:
    form, _, address = str(root).partition(":")
    if isinstance(root, str) and form in PREFIXES:
        return open_table(address) if form == "hf" else open_tars(address)
    root = Path(root)
    if not root.exists():
        raise UserError("no such folder or zip file of images", field="root", value=root)
    return Folder(root) if root.is_dir() else Zip(regular_file(root))


def find_labels(source: FileSource, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return labels int64 [n] of the images ``names`` and the names of the classes; (None, ()) without labels.

    Classes without an image are named on stderr.
    """
    if isinstance(source, Labelled):
        numbers, classes = source.labels(names)
    else:
        label, classes = _labels(source, names)
        numbers = None if label is None else torch.tensor([label[name] for name in names])
    if numbers is None:
        return None, classes
    counts = numbers.bincount(minlength=len(classes)).tolist()
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        shown = ", ".join(empty[:20]) + (f" and {len(empty) - 20} more" if len(empty) > 20 else "")
        tqdm.write(f"{source.root}: classes without an image: {shown}", file=sys.stderr)
    return numbers, classes


def summary(others: list[str], most: int = 20) -> list[str]:
    """Describe what is left out: each that has a reason, and the other files by name, or as counts by suffix.

    At most ``most`` of each kind are listed.
    """
    reasons = [shorten(name) for name in others if name.endswith(")")]
    names = [shorten(name) for name in others if not name.endswith(")")]
    if len(names) <= most:
        shown = [f"{name} (not an image by its suffix)" for name in names]
    else:
        suffixes = Counter(PurePosixPath(name).suffix or "no suffix" for name in names)
        shown = [f"{count} files with {suffix}" for suffix, count in suffixes.most_common(most)]
    return reasons[:most] + [f"{len(reasons) - most} more of that kind"] * (len(reasons) > most) + shown


def _labels(source: FileSource, names: list[str]) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Return the label of each image and the names of the classes; (None, ()) without labels.

    Folders that all images share, such as the one that ``zip -r`` puts in front, are ignored.
    """
    parents = [name.rpartition("/")[0] for name in names]
    parts = {parent: PurePosixPath(parent).parts for parent in dict.fromkeys(parents)}
    first, depth = parts[parents[0]], 0
    while all(len(path) > depth and path[depth] == first[depth] for path in parts.values()):
        depth += 1
    for level in range(depth + 1):
        prefix = "".join(f"{part}/" for part in first[:level])
        try:
            content = source.read(prefix + LABELS)
        except (FileNotFoundError, IsADirectoryError, KeyError):
            continue
        except READ_ERRORS as error:
            raise UserError(f"{source.root}/{prefix}{LABELS} cannot be read ({error}): create it again") from None
        return _listed_labels(content, f"{source.root}/{prefix}{LABELS}", names, prefix)
    top = {parent: path[depth] if len(path) > depth else "" for parent, path in parts.items()}
    classes = tuple(sorted(set(top.values())))
    if "" in classes or len(classes) < 2:
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return {name: number[top[parent]] for name, parent in zip(names, parents, strict=True)}, classes


def _listed_labels(
    content: bytes, file: str, names: list[str], prefix: str
) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Return the labels that a dataset.json has for ``names``, which it lists without ``prefix``."""
    try:
        listed = parse_json(content, file, "create it again")["labels"]
        if listed is None:
            return None, ()
        known = {prefix + str(name): value for name, value in listed}
        label = {name: known[name] for name in names}
        for name, value in label.items():
            if type(value) is not int or not 0 <= value < MOST_CLASSES:
                raise ValueError(f"{value!r} of {name} is not an integer from 0 on, below {MOST_CLASSES:,}")
        if (first := min(label.values())) > 0:
            raise ValueError(f"the labels begin at {first}, so that class 0 has no image: count from 0")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = f"nothing for {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{file} must hold 'labels', a list of [name, number] for each image, or null for none ({reason})"
        ) from None
    return label, tuple(str(i) for i in range(max(label.values()) + 1))
