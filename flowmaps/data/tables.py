"""Data sets of the Hugging Face library ``datasets``: their pictures as bytes, from memory-mapped Arrow tables."""

import bisect
import os
import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmaps.data.dataset import numbered
from flowmaps.data.file_source import check_size
from flowmaps.errors import UserError, choose, shorten

FILES = {".parquet": "parquet", ".arrow": "arrow"}  # suffix of a single file -> the library's name of its format
IMAGES, LABELS = ("image", "img", "picture", "jpg", "png"), ("label", "labels", "class", "cls")  # names of columns
FORM = re.compile(r"(?P<place>[^#]*?)(:(?P<config>[\w.+-]+))?(@(?P<split>[^#]+))?(#(?P<image>[^,]*)(,(?P<label>.+))?)?")


class Address(NamedTuple):
    """A data set: a repository of the hub or a local path, its config, its split, and its columns; or empty texts."""

    place: str
    config: str
    split: str
    image: str
    label: str


def address(text: str) -> Address:
    """Read ``PLACE[:CONFIG][@SPLIT][#IMAGE[,LABEL]]``; an existing path is a place as it stands."""
    found = None if Path(text).exists() else FORM.fullmatch(text)
    parts = {"place": text} if found is None else found.groupdict()
    return Address(*((parts.get(name) or "") for name in Address._fields))


@dataclass(frozen=True)
class Table:
    """The rows of a ``datasets.Dataset``, named by their numbers; made by ``open_table``."""

    root: Path  # what errors call it
    dataset: Any
    image: str
    label: str
    _columns: dict[int, Any] = field(default_factory=dict, compare=False)  # by process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}

    def _column(self) -> tuple[list[Any], list[int]]:
        """Return the pieces of the column of images, and the number of rows up to the end of each."""
        if os.getpid() not in self._columns:
            pieces = self.dataset.data.column(self.image).chunks
            self._columns[os.getpid()] = pieces, list(accumulate(len(piece) for piece in pieces))
        pieces, ends = self._columns[os.getpid()]
        return pieces, ends

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return the rows with the sizes of their images and the fingerprint of the data set."""
        import pyarrow as pa
        import pyarrow.compute as pc

        sizes: list[int] = []
        for piece in self._column()[0]:
            nested = pa.types.is_struct(piece.type)
            lengths = pc.binary_length(pc.struct_field(piece, "bytes") if nested else piece)
            sizes += [self._size(len(sizes) + i, size) for i, size in enumerate(lengths.to_pylist())]
        mark = self.dataset._fingerprint
        return {str(row): f"{size} {mark}" for row, size in enumerate(sizes)}, []

    def _size(self, row: int, size: int | None) -> int:
        """Return the bytes of a row's image, which is elsewhere if its size is None."""
        if size is not None:
            return size
        _, path = self._row(row)
        return Path(path).stat().st_size if path and Path(path).is_file() else 0

    def _row(self, row: int) -> tuple[bytes | None, str | None]:
        pieces, ends = self._column()
        which = bisect.bisect_right(ends, row)
        value = pieces[which][row - (ends[which - 1] if which else 0)].as_py()
        return (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)

    def read(self, name: str) -> bytes:
        content, path = self._row(int(name))
        if content is None and path:
            check_size(Path(path).stat().st_size)
            return Path(path).read_bytes()
        check_size(len(content or b""))
        return content or b""

    def labels(self, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
        """Return labels int64 [n] of the rows ``names`` and the names of the classes; (None, ()) without labels."""
        if not self.label:
            return None, ()
        values = self.dataset.data.column(self.label).to_pylist()
        classes = getattr(self.dataset.features[self.label], "names", None)
        kept = [None if values[int(name)] == -1 else values[int(name)] for name in names]  # -1: not labelled
        return numbered(kept, names, str(self.root), classes)


def open_table(text: str) -> Table:
    """Open a data set of the Hugging Face hub, or local files that ``datasets`` reads, without reading an image.

    Args:
        text: ``PLACE[:CONFIG][@SPLIT][#IMAGE[,LABEL]]``. PLACE is a repository such as ``uoft-cs/cifar100``, a folder
            of parquet, Arrow or image files, one parquet or Arrow file, or what ``save_to_disk`` wrote. SPLIT is by
            default ``train``, and may be a part of one, ``train[:90%]``. IMAGE and LABEL are columns; by default the
            only one of images, and the only one of class labels or one that is called label.

    Returns:
        The table. ``datasets`` converts other formats than Arrow into its own cache, once, and maps them into memory.

    Raises:
        UserError: The library is missing, it cannot open the data set, or the columns are not clear.
    """
    found, (_, _, _, image, label) = _open(text)
    return Table(Path(text.partition("#")[0]), found, *_columns(found, text, image, label))


def read_vectors(text: str) -> NDArray[np.float32] | None:
    """Return the column of numbers that ``PLACE[:CONFIG][@SPLIT]#COLUMN`` names, [n, ...]; None if it holds images.

    Raises:
        UserError: There is no such data set or column, or its rows are not numbers of one shape.
    """
    found, (_, _, _, column, _) = _open(text)
    if column not in found.features:
        raise UserError(f"{shorten(text)} has no column {shorten(column)}: {choose(column, found.features)}")
    if _holds_bytes(found.data.column(column).type):
        return None
    try:
        return np.asarray(found.data.column(column).to_pylist(), dtype=np.float32)
    except (TypeError, ValueError):
        raise UserError(f"the column {column} of {shorten(text)} does not hold numbers of one shape") from None


def _open(text: str) -> tuple[Any, Address]:
    """Open what ``text`` names by the library, and return it with the parts of ``text``."""
    try:
        import datasets
    except ImportError:
        raise UserError('needs the package datasets: pip install "flowmaps[datasets]"', field="name") from None
    parts = address(text)
    try:
        found = _load(datasets, Path(parts.place), parts.place, parts.config, parts.split or "train")
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's and the network's
        raise UserError(
            f"{shorten(text)} cannot be opened as a Hugging Face dataset ({shorten(error, 200)}): check name, config "
            "and split, as in REPO:config@split"
        ) from None
    if not len(found):
        raise UserError(f"{shorten(text)} has no rows: choose another split, as in {parts.place}@test")
    return found, parts


def _load(datasets: Any, path: Path, place: str, config: str, split: str) -> Any:
    saved = [(path / name).is_file() for name in ("dataset_dict.json", "state.json")]
    if any(saved):  # by save_to_disk
        loaded = datasets.load_from_disk(place)
        if saved[0] and split not in loaded:
            raise ValueError(choose(split, loaded))
        return loaded[split] if saved[0] else loaded
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"a file must be one of {', '.join(FILES)}")
        return datasets.load_dataset(FILES[path.suffix], data_files=place, split=split)
    return datasets.load_dataset(place, config or None, split=split)


def _columns(dataset: Any, text: str, image: str, label: str) -> tuple[str, str]:
    """Return the columns of images and of labels, the latter "" without any."""
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    for named in filter(None, (image, label)):
        if named not in kinds:
            raise UserError(f"{shorten(text)} has no column {shorten(named)}: {choose(named, kinds)}")
    raw = {name for name in kinds if _holds_bytes(dataset.data.column(name).type)}
    if image and image not in raw:
        raise UserError(f"the column {image} of {shorten(text)} holds no images: choose another, as in #COLUMN")
    pictures = [name for name, kind in kinds.items() if kind == "Image" and name in raw]
    pictures = pictures or [name for name in IMAGES if name in raw]
    if not image and len(pictures) != 1:
        raise UserError(
            f"{shorten(text)} has {len(pictures)} columns of images among {', '.join(kinds)}: choose one, as in #image"
        )
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = [name for name in LABELS if name in labels] or labels or [name for name in LABELS if name in kinds]
    if not label and len(labels) > 1 and labels[0] not in LABELS:
        raise UserError(
            f"{shorten(text)} has several columns of classes ({', '.join(labels)}): choose one, as in "
            f"#{image or pictures[0]},{labels[0]}"
        )
    return image or pictures[0], label or next(iter(labels), "")


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    binary = (pa.binary(), pa.large_binary())
    if pa.types.is_struct(kind):
        return any(part.name == "bytes" and part.type in binary for part in kind)
    return kind in binary
