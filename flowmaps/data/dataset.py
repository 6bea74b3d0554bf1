"""The interface of a data set, and iteration over one."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

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


def iterate(data: DataSet, items: range | None = None, batch: int = 500) -> Iterator[Batch]:
    """Yield all of ``data``, or the ``items`` of it, from first to last, ``batch`` items at a time."""
    items = range(len(data)) if items is None else items
    for start in range(items.start, items.stop, batch):
        yield data.fetch(torch.arange(start, min(start + batch, items.stop)))
