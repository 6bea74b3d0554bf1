"""The order in which a run visits its data, and batches of it by number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowmaps.data.dataset import Batch
from flowmaps.data.read_ahead import SETTING, Fetches, ReadAhead
from flowmaps.errors import UserError
from flowmaps.rng import generator

MOST_WORKERS = 1024


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
        workers: Processes that read ahead; 0 reads when asked. They need no shared memory.
        pin: Put batches into pinned memory.

    Asking for batches in sequence is fast; any other number restarts the workers there. ``batch`` waits for nothing
    without an end: workers that cannot be started, that end, or that take ten minutes for an item are a ``UserError``.
    """

    def __init__(self, data: Fetches, indices: Callable[[int], Tensor], workers: int, pin: bool = False) -> None:
        if not 0 <= workers <= MOST_WORKERS:
            raise UserError(f"workers={workers} must lie in 0 .. {MOST_WORKERS} {SETTING}")
        self.data, self.indices, self.workers, self.pin = data, indices, workers, pin
        self._next = -1
        self._ahead: ReadAhead | None = None

    def batch(self, k: int) -> Batch:
        """Return the items and labels of batch ``k``."""
        if not self.workers:
            x, labels = self.data.fetch(self.indices(k))
            return (x.pin_memory(), labels if labels is None else labels.pin_memory()) if self.pin else (x, labels)
        if self._ahead is None or k != self._next:
            self.close()
            self._ahead = ReadAhead(self.data, self.indices, k, self.workers, self.pin)
        try:
            rows = self._ahead.take(k)
        except BaseException:
            self.close()
            raise
        self._next = k + 1
        return rows

    def close(self) -> None:
        """End the workers."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the workers when the block ends, in whatever way."""
        try:
            yield
        finally:
            self.close()
