"""The interface of a data set, and iteration over one."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.info import MOST_CLASSES

Batch = tuple[Tensor, Tensor | None]  # items [b, ...] as they are stored, and their labels, of classes int64 [b]


class DataSet(Protocol):
    """A data set for training and for scoring; a class that inherits from it gets the defaults of ``name`` and below.

    ``fetch`` returns images uint8 [b, C, H, W], points float32 [b, dim], or the stored moments of ``Latents``.
    """

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (channels, height, width) or (dim,)."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""

    @property
    def class_shares(self) -> tuple[float, ...]:
        """Share of each class in the data; empty where they are as good as equal, or not known."""
        return ()

    @property
    def condition(self) -> tuple[int, ...]:
        """Shape of what an item has in place of a class, floats; empty if it has nothing of the kind."""
        return ()

    def fetch(self, index: Tensor) -> Batch:
        """Return the items at ``index`` [b] as they are stored, and their labels int64 [b], conditions or None."""

    def digest(self) -> str:
        """Return the fingerprint by which a resumed run recognises its data."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty if they have none but their numbers."""
        return ()

    @property
    def name(self) -> str:
        """Name of the data set in the record of a score."""
        return ""

    @property
    def split(self) -> str:
        """The part of a built-in data set: train or heldout."""
        return ""

    @property
    def crop(self) -> str:
        """Origin of the images' size, for the record of a score."""
        return "none"

    def content(self) -> str:
        """Return a SHA-256 over everything that determines the pixels."""
        return self.digest()


def named(classes: Sequence[str]) -> tuple[str, ...]:
    """Return ``classes`` unless they are only the numbers 0, 1, ..., as those of a dataset.json are."""
    return () if all(name == str(number) for number, name in enumerate(classes)) else tuple(classes)


def numbered(
    values: Sequence[int | str | None], names: Sequence[str], where: str, classes: Sequence[str] | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return labels int64 [n] of the items ``names`` and the names of the classes; (None, ()) if no item has a label.

    Args:
        values: The label of each item: a number, or a text, which is a number or a name; None without one.
        names: What errors call the items.
        where: What they call the source.
        classes: The names of the classes by number; by default names in alphabetical order, or the numbers.

    Raises:
        UserError: Some items have no label, or a label is not a number from 0 on.
    """
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if len(missing) == len(values):
        return None, ()
    if missing:
        raise UserError(f"{where}: {len(missing)} items have no label, such as {missing[0]}: label all or none")
    numbers: dict[Any, int]
    if classes is None and any(isinstance(value, str) and not value.isdecimal() for value in values):
        classes = sorted({str(value) for value in values})
        numbers = {name: i for i, name in enumerate(classes)}
        return torch.tensor([numbers[str(value)] for value in values]), tuple(classes)
    try:
        label = [int(value) for value in values if value is not None]
    except ValueError as error:
        raise UserError(f"{where}: a label is not a number ({shorten(error, 80)})") from None
    low, high = min(label), max(label)
    if low < 0 or high >= (MOST_CLASSES if classes is None else len(classes)):
        wrong, most = (low, high)[low >= 0], MOST_CLASSES if classes is None else len(classes)
        raise UserError(f"{where}: the label of {names[label.index(wrong)]} is {wrong}, not in 0 .. {most - 1:,}")
    if low > 0 and classes is None:
        raise UserError(f"{where}: the labels begin at {low}, so that class 0 has no image: count from 0")
    return torch.tensor(label), tuple(map(str, range(high + 1))) if classes is None else tuple(classes)


def iterate(data: DataSet, items: range | None = None, batch: int = 500) -> Iterator[Batch]:
    """Yield all of ``data``, or the ``items`` of it, from first to last, ``batch`` items at a time."""
    items = range(len(data)) if items is None else items
    for start in range(items.start, items.stop, batch):
        yield data.fetch(torch.arange(start, min(start + batch, items.stop)))
