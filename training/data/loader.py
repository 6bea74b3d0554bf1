"""The order in which a run visits its data, and worker processes that read ahead in it."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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

    def shard(self, k: int) -> Rows:
        """Samples and labels of shard ``k``."""
        if not self.workers:
            return self.data.fetch(self.indices(k))
        if k != self._next:
            self._ahead = self._read_from(k)
        try:
            rows = next(self._ahead)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            if not reason.startswith("DataLoader worker (pid"):
                raise
            raise UserError(f"a data worker ended ({reason}): lower --config.data.workers={self.workers}") from None
        if isinstance(rows, UserError):
            raise rows
        self._next = k + 1
        return rows

    def _read_from(self, k: int) -> Iterator[Rows | UserError]:
        return iter(
            DataLoader(
                _Reader(self.data),
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
    """Runs in a worker; a refused file travels back as a value, so that its message stays one line."""

    def __init__(self, data: Fetches) -> None:
        self.data = data

    def __getitems__(self, index: list[int]) -> Rows | UserError:
        try:
            return self.data.fetch(torch.tensor(index))
        except UserError as error:
            return error


def _as_it_is(rows: Any) -> Any:
    return rows
