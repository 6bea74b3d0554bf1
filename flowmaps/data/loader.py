"""The order in which a run visits its data, and worker processes that read ahead in it."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flowmaps.errors import UserError
from flowmaps.rng import generator

Rows = tuple[Tensor, Tensor | None]


class Fetches(Protocol):
    """What a loader asks of a data set."""

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Items ``index`` [b] as they are stored, and their label int64 [b] or None."""


class DataSet(Fetches, Protocol):
    """What training asks of a data set.

    ``fetch`` gives images uint8 [b, C, H, W], points float32 [b, dim], or the moments of ``Latents``.
    """

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (channels, height, width) or (dim,)."""

    @property
    def num_classes(self) -> int:
        """0: no labels."""

    def digest(self) -> str:
        """What a run keeps to know its data by."""


def in_order(data: DataSet, items: range | None = None, batch: int = 500) -> Iterator[Rows]:
    """All of a data set or the ``items`` of it from first to last, ``batch`` samples at a time."""
    items = range(len(data)) if items is None else items
    for start in range(items.start, items.stop, batch):
        yield data.fetch(torch.arange(start, min(start + batch, items.stop)))


class Order:
    """The endless order of visits: position p is item p mod n of a permutation keyed by (seed, p div n).

    A function of position alone, so that it needs no state in a checkpoint and no agreement between processes.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}  # a batch may straddle two
            self._epochs[epoch] = torch.randperm(self.n, generator=generator(self.seed, "order", epoch))
        return self._epochs[epoch]

    def indices(self, start: int, count: int) -> Tensor:
        """Item indices int64 [count] at positions ``start`` .. ``start + count - 1``."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.n)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)


class Loader:
    """Gives the data at numbered shards, the same whether or not ``workers`` processes read ahead.

    ``indices(k)`` says which items shard k has, none after the last one if there is a last. Asking for shards in order
    is fast; any other shard starts anew there.
    """

    def __init__(self, data: Fetches, indices: Callable[[int], Tensor], workers: int, pin: bool = False) -> None:
        self.data, self.indices, self.workers, self.pin = data, indices, workers, pin
        self._next = -1
        self._ahead: Iterator[Rows | UserError] = iter(())
        self._held = torch.full((workers, 2), -1).share_memory_()  # type: ignore[no-untyped-call]  # process and item that each worker is at

    def shard(self, k: int) -> Rows:
        """Samples and labels of shard ``k``."""
        if not self.workers:
            return self.data.fetch(self.indices(k))
        if k != self._next:
            self._ahead = self._read_from(k)
        with self.watched():
            rows = next(self._ahead)
        if isinstance(rows, UserError):
            raise rows
        self._next = k + 1
        return rows

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A worker that ends inside the block, be it while its rows are not waited for, is a user's error by name."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            named = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", reason)
            if named is None:
                raise
            ended = [int(pid) for pid in named[1].split(",")]
            items = [item for pid, item in self._held.tolist() if pid in ended and item >= 0]
            held = (
                f" at {', '.join(self.data.file_of(item) for item in items)}" if hasattr(self.data, "file_of") else ""
            )
            raise UserError(
                f"a data worker ended{held if items else ''} ({reason}): is there memory enough, and the file sound? "
                f"--config.data.workers={self.workers} may be lowered"
            ) from None

    def _read_from(self, k: int) -> Iterator[Rows | UserError]:
        return iter(
            DataLoader(
                _Reader(self.data, self._held),
                batch_sampler=_Shards(self.indices, k),
                num_workers=self.workers,
                prefetch_factor=4,
                pin_memory=self.pin,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # its own: starting an iterator draws a number
            )
        )


class _Shards:
    """Index lists of shards ``start``, ``start + 1``, ... to the first that is empty."""

    def __init__(self, indices: Callable[[int], Tensor], start: int) -> None:
        self.indices, self.start = indices, start

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while len(items := self.indices(k)):
            yield items.tolist()
            k += 1


class _Reader(Dataset[Rows]):
    """Runs in a worker, and notes each item that it reads from a file in ``held``.

    A refused file travels back as a value, so that its message stays one line.
    """

    def __init__(self, data: Fetches, held: Tensor) -> None:
        self.data, self.held = data, held

    def __getitems__(self, index: list[int]) -> Rows | UserError:
        mine = self.held[cast(Any, get_worker_info()).id]
        mine[0] = os.getpid()
        try:
            if not hasattr(self.data, "file_of"):
                return self.data.fetch(torch.tensor(index))
            rows = []
            for item in index:
                mine[1] = item
                rows.append(self.data.fetch(torch.tensor([item])))
            x, labels = [x for x, _ in rows], [label for _, label in rows if label is not None]
            if len({row.shape for row in x}) > 1:
                return self.data.fetch(torch.tensor(index))  # which says what file has another shape
            return torch.cat(x), torch.cat(labels) if labels else None
        except UserError as error:
            return error
        finally:
            mine[1] = -1


def _as_it_is(rows: Any) -> Any:
    return rows
