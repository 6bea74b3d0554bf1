"""The order in which a run visits its data, and worker processes that read ahead in that order."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flowmaps.data.dataset import Batch
from flowmaps.errors import UserError
from flowmaps.rng import generator


class Fetches(Protocol):
    """The part of a data set that a loader needs."""

    def fetch(self, index: Tensor) -> Batch:
        """Return the items at ``index`` [b] as they are stored, with their labels int64 [b] or None."""


class ShuffledOrder:
    """The endless order of visits: position p is item p mod n of a permutation keyed by (seed, p div n).

    A function of the position alone: it needs no state in a checkpoint and no communication between processes.
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
        """Return the item indices int64 [count] at positions ``start`` .. ``start + count - 1``."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.n)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)


class Loader:
    """Fetches numbered batches, the same ones whether or not worker processes read ahead.

    Args:
        data: The data set.
        indices: Maps the number of a batch to its items int64 [b]; empty after the last batch, if there is a last.
        workers: Processes that read ahead; 0 reads when asked.
        pin: Put batches into pinned memory.

    Asking for batches in sequence is fast; any other number restarts the workers there.
    """

    def __init__(self, data: Fetches, indices: Callable[[int], Tensor], workers: int, pin: bool = False) -> None:
        self.data, self.indices, self.workers, self.pin = data, indices, workers, pin
        self._next = -1
        self._ahead: Iterator[Batch | UserError] = iter(())
        self._held = torch.full((workers, 2), -1)  # process and item that each worker is at
        if workers:
            self._held.share_memory_()  # type: ignore[no-untyped-call]

    def batch(self, k: int) -> Batch:
        """Return the items and labels of batch ``k``."""
        if not self.workers:
            x, labels = self.data.fetch(self.indices(k))
            return (x.pin_memory(), labels if labels is None else labels.pin_memory()) if self.pin else (x, labels)
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
        """Turn the end of a worker inside the block, even one not waited for, into a ``UserError`` with its file."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            named = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", reason)
            if named is None:
                raise
            ended = [int(pid) for pid in named[1].split(",")]
            items = [item for pid, item in self._held.tolist() if pid in ended and item >= 0]
            files = [self.data.file_of(item) for item in items] if hasattr(self.data, "file_of") else []
            raise UserError(
                f"a data worker ended{' at ' if files else ''}{', '.join(files)} ({reason}): out of memory, or a "
                f"damaged file? Try fewer workers than workers={self.workers}"
            ) from None

    def _read_from(self, k: int) -> Iterator[Batch | UserError]:
        return iter(
            DataLoader(
                _Reader(self.data, self._held),
                batch_sampler=_Batches(self.indices, k),
                num_workers=self.workers,
                prefetch_factor=4,
                pin_memory=self.pin,
                collate_fn=_unchanged,
                generator=torch.Generator(),  # a separate one: starting an iterator draws a number
            )
        )


class _Batches:
    """Index lists of batches ``start``, ``start + 1``, ... up to the first empty one."""

    def __init__(self, indices: Callable[[int], Tensor], start: int) -> None:
        self.indices, self.start = indices, start

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while len(items := self.indices(k)):
            yield items.tolist()
            k += 1


class _Reader(Dataset[Batch]):
    """Runs in a worker and records in ``held`` each item that it reads from a file.

    A refused file is returned as a value, so that its message stays one line.
    """

    def __init__(self, data: Fetches, held: Tensor) -> None:
        self.data, self.held = data, held

    def __getitems__(self, index: list[int]) -> Batch | UserError:
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
                return self.data.fetch(torch.tensor(index))  # raises the error that names the odd file
            return torch.cat(x), torch.cat(labels) if labels else None
        except UserError as error:
            return error
        finally:
            mine[1] = -1


def _unchanged(rows: Any) -> Any:
    return rows
