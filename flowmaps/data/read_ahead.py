"""Processes that read batches ahead of a loader.

Each has a socket, by which the items to read come and rows go back as plain bytes: nothing passes through shared
memory, which is often small, and every error has a place where it is noticed.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmaps.data.dataset import Batch
from flowmaps.errors import UserError, shorten

AHEAD = 4  # batches per worker that are asked for before they are needed
SETTING = "(data.workers in a config)"
PATIENCE = 600  # seconds that a worker may take to read one item


class Fetches(Protocol):
    """The part of a data set that a loader needs."""

    def fetch(self, index: Tensor) -> Batch:
        """Return the items at ``index`` [b] as they are stored, with their labels int64 [b] or None."""


class ReadAhead:
    """Reads the batches ``first``, ``first + 1``, ... by ``workers`` processes.

    Args:
        data: The data set.
        indices: Maps the number of a batch to its items int64 [b]; empty after the last batch.
        first: Number of the first batch.
        workers: Number of processes.
        pin: Put batches into pinned memory.

    Raises:
        UserError: The system does not let the processes start.
    """

    def __init__(
        self, data: Fetches, indices: Callable[[int], Tensor], first: int, workers: int, pin: bool = False
    ) -> None:
        self.data, self.indices, self.workers, self.pin = data, indices, workers, pin
        self._asked = first  # the next batch to ask for
        self._last = False
        self._busy: dict[int, int] = {}  # batch by worker
        self._rows: dict[int, Batch | BaseException] = {}  # by batch; an error is raised when its batch is taken
        self._processes: list[Any] = []
        self._sockets: list[socket.socket] = []
        self.close = weakref.finalize(self, _end, self._processes, self._sockets)
        try:
            self._held: Any = multiprocessing.RawArray("q", workers * [-1])  # the item that each worker reads
            for worker in range(workers):
                ours, theirs = socket.socketpair()
                self._sockets.append(ours)
                ours.settimeout(PATIENCE)
                with theirs:
                    arguments = (data, theirs, self._held, worker)
                    self._processes.append(multiprocessing.Process(target=_work, args=arguments, daemon=True))
                    self._processes[-1].start()
        except OSError as error:  # of descriptors, processes, memory
            self.close()
            raise UserError(
                f"{workers} data workers cannot start ({error.strerror}): set fewer {SETTING}, or raise the system's "
                "limits on open files and processes (ulimit -n, ulimit -u)"
            ) from None

    def take(self, k: int) -> Batch:
        """Return batch ``k``, waiting for it if need be; batches are taken in order."""
        self._exchange(k, timeout=0)
        patience = PATIENCE
        while k not in self._rows:
            if not self._busy:
                raise IndexError(f"no batch {k}")
            before = [*self._held]
            if not self._exchange(k, timeout=1):
                patience = PATIENCE if before != [*self._held] else patience - 1
            if patience <= 0:
                raise UserError(
                    f"no data worker has read an item for {PATIENCE} seconds{self._files(self._busy)}: does the disk "
                    f"answer? Without workers {SETTING} its own error is seen"
                )
        rows = self._rows.pop(k)
        if isinstance(rows, BaseException):
            raise rows
        return rows

    def _exchange(self, k: int, timeout: float) -> bool:
        """Take in what is ready while batch ``k`` is needed, and give idle workers more; return whether any was."""
        ready = wait([self._sockets[worker] for worker in self._busy], timeout)
        for worker in [worker for worker in self._busy if self._sockets[worker] in ready]:
            self._rows[self._busy[worker]] = self._receive(worker)
            del self._busy[worker]
        for worker in range(self.workers):
            if worker in self._busy or self._last or self._asked >= k + AHEAD * self.workers:
                continue
            items = self.indices(self._asked)
            self._last = not len(items)
            if self._last:
                break
            try:
                _send(self._sockets[worker], items.tolist())
            except OSError:
                raise self._ended(worker) from None
            self._busy[worker] = self._asked
            self._asked += 1
        return bool(ready)

    def _receive(self, worker: int) -> Batch | BaseException:
        end = self._sockets[worker]
        try:
            answer = _answer(end)
            if isinstance(answer, BaseException):
                return answer
            x, labels = (None if kind is None else self._tensor(end, *kind) for kind in answer)
            assert x is not None
            return x, labels
        except (EOFError, ConnectionError, TimeoutError):
            raise self._ended(worker) from None

    def _tensor(self, end: socket.socket, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, pin_memory=self.pin)
        _fill(end, _bytes(x))
        return x

    def _ended(self, worker: int) -> UserError:
        process = self._processes[worker]
        process.join(1)
        code = process.exitcode
        reason = "stopped" if code is None else f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return UserError(
            f"a data worker ended{self._files([worker])} ({reason}): out of memory, or a damaged file? Try fewer "
            f"than workers={self.workers} {SETTING}"
        )

    def _files(self, workers: Any) -> str:
        items = [self._held[worker] for worker in workers if self._held[worker] >= 0]
        files = [self.data.file_of(item) for item in items] if hasattr(self.data, "file_of") else []
        return f" at {', '.join(files)}" if files else ""


def _end(processes: list[Any], sockets: list[socket.socket]) -> None:
    started = [process for process in processes if process.pid]
    for process in started:
        process.kill()
    for process in started:
        process.join()
    for end in sockets:
        end.close()


def _work(data: Fetches, end: socket.socket, held: Any, me: int) -> None:
    """Run in a worker: answer lists of items by their rows, or by the error that reading them raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            items = _answer(end)
            try:
                rows = _read(data, items, held, me)
            except Exception as error:
                _send(end, _portable(error))
                continue
            held[me] = -1
            _send(end, [None if x is None else (x.shape, x.dtype) for x in rows], *(x for x in rows if x is not None))
    except (EOFError, OSError):  # the parent has left
        pass


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _read(data: Fetches, items: list[int], held: Any, me: int) -> Batch:
    """Fetch ``items``, noting in ``held`` each that is read from a file."""
    if not hasattr(data, "file_of"):
        return data.fetch(torch.tensor(items))
    rows = []
    for held[me] in items:
        rows.append(data.fetch(torch.tensor([held[me]])))
    x, labels = [x for x, _ in rows], [label for _, label in rows if label is not None]
    if len({row.shape[1:] for row in x}) > 1:
        return data.fetch(torch.tensor(items))  # raises the error that names the odd file
    return torch.cat(x), torch.cat(labels) if labels else None


def _portable(error: Exception) -> Exception:
    """Return ``error``, or if it cannot be sent to another process, one that says the same."""
    made = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its class has its own constructor, or what it carries cannot be pickled
        made = RuntimeError(f"{type(error).__name__}: {shorten(error)}")
    if not isinstance(error, UserError | OSError):
        made.add_note("".join(traceback.format_exception(error)))
    return made


def _bytes(x: Tensor) -> memoryview:
    content: Any = x.flatten().view(torch.uint8).numpy()
    return memoryview(content)


def _send(end: socket.socket, message: Any, *tensors: Tensor) -> None:
    content = pickle.dumps(message)
    end.sendall(struct.pack("<Q", len(content)) + content)
    for x in tensors:
        end.sendall(_bytes(x.contiguous()))


def _answer(end: socket.socket) -> Any:
    size = bytearray(8)
    _fill(end, memoryview(size))
    content = bytearray(struct.unpack("<Q", size)[0])
    _fill(end, memoryview(content))
    return pickle.loads(content)


def _fill(end: socket.socket, buffer: memoryview) -> None:
    """Receive exactly ``buffer``."""
    while len(buffer):
        count = end.recv_into(buffer)
        if not count:
            raise EOFError("the other end is closed")
        buffer = buffer[count:]
