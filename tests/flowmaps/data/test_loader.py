"""Batches by number: the same with and without worker processes, and an error for whatever becomes of those."""

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from flowmaps import UserError
from flowmaps.data import ArrayData, Loader, ShuffledOrder


def loader_of(data, workers, batch=8):
    order = ShuffledOrder(len(data), 0)
    return Loader(data, lambda k: order.indices(batch * k, batch), workers)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labelled", [True, False])
def test_workers_change_no_batch(dtype, labelled):
    data = ArrayData((torch.randn(50, 3, 5) * 9).to(dtype), torch.arange(50) % 7 if labelled else None)
    alone, together = loader_of(data, 0), loader_of(data, 3)
    with together.watched():
        for k in [*range(12), 4, 5, 30]:  # in order, then from other numbers
            (x, label), (other_x, other_label) = alone.batch(k), together.batch(k)
            assert torch.equal(x, other_x) and x.dtype == other_x.dtype
            assert (label is None and other_label is None) or torch.equal(label, other_label)
    assert not multiprocessing.active_children()


def test_batches_larger_than_what_a_socket_holds():
    data = ArrayData(torch.arange(40 * 300_000, dtype=torch.int32).view(40, -1))
    with (loader := loader_of(data, 2)).watched():
        for k in range(6):
            assert torch.equal(loader.batch(k)[0], loader_of(data, 0).batch(k)[0])


def test_nothing_passes_through_shared_memory(monkeypatch):
    """Containers have 64 MB of it; torch's own workers wait for ever when it is full."""

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    with (loader := loader_of(ArrayData(torch.arange(64)), 2)).watched():
        assert len(loader.batch(0)[0]) == 8


def test_after_the_last_batch_there_is_an_error():
    loader = Loader(ArrayData(torch.arange(3)), lambda k: torch.arange(3)[k : k + 1], workers=2)
    with loader.watched():
        assert [int(loader.batch(k)[0]) for k in range(3)] == [0, 1, 2]
        with pytest.raises(IndexError, match="no batch 3"):
            loader.batch(3)


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Failing:
    """A data set of files that does something else at item 5."""

    def __init__(self, act):
        self.act = act

    def file_of(self, item):
        return f"file-{item}"

    def fetch(self, index):
        if 5 in index.tolist():
            self.act()
        return index.clone(), None


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (UserError("picture 5 is damaged"), UserError, "picture 5 is damaged"),
        (OSError(errno.EMFILE, "Too many open files", "x.png"), OSError, "Too many open files"),
        (MemoryError("5 GB"), MemoryError, "5 GB"),
        (Odd(1, 2), RuntimeError, "Odd: 1 and 2"),
        (ZeroDivisionError("here"), ZeroDivisionError, "here"),
    ],
)
def test_an_error_in_a_worker_is_raised_in_the_run(error, kind, said, capfd):
    loader = Loader(Failing(raising(error)), lambda k: torch.arange(3 * k, 3 * k + 3), workers=2)
    with loader.watched():
        assert loader.batch(0)[0].tolist() == [0, 1, 2]
        with pytest.raises(kind, match=said) as caught:
            loader.batch(1)
        assert ("in act" in "".join(getattr(caught.value, "__notes__", []))) == (kind not in (UserError, OSError))
        assert loader.batch(2)[0].tolist() == [6, 7, 8]  # in new workers
    assert not capfd.readouterr().err and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"ended at file-5 \(by SIGKILL\).*workers=2 \(data\.workers"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), r"ended at file-5 \(by SIGUSR1\)"),
        (lambda: os._exit(3), r"ended at file-5 \(with code 3\)"),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), "read an item for 1 seconds at .*file-5"),
        (lambda: time.sleep(1000), "read an item for 1 seconds at .*file-5"),
    ],
)
def test_a_worker_that_ends_or_hangs_is_named_with_its_file(monkeypatch, act, said):
    monkeypatch.setattr("flowmaps.data.read_ahead.PATIENCE", 1)
    loader = Loader(Failing(act), lambda k: torch.arange(3 * k, 3 * k + 3), workers=2)
    with loader.watched(), pytest.raises(UserError, match=said):
        loader.batch(0), loader.batch(1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("spare", [0, 4, 9, 30])
def test_few_open_files_are_one_line(spare):
    """Wherever the limit is met: all workers start, or none is left."""
    taken = len(list(Path("/dev/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = loader_of(ArrayData(torch.arange(64)), 16)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + spare, hard))
        with (
            loader.watched(),
            pytest.raises(UserError, match=r"16 data workers cannot start .*open files.*data.workers"),
        ):
            loader.batch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not multiprocessing.active_children() and len(loader.batch(0)[0]) == 8
    loader.close()


@pytest.mark.parametrize("workers", [-1, 10**9])
def test_a_number_of_workers_out_of_bounds(workers):
    with pytest.raises(UserError, match=r"workers=.* must lie in 0 .. 1024"):
        loader_of(ArrayData(torch.arange(64)), workers)


def _killed(pids):
    loader = loader_of(ArrayData(torch.arange(64)), 2)
    loader.batch(0)
    pids.send([process.pid for process in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_run():
    pids, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(theirs,))
    process.start()
    files = [Path(f"/proc/{pid}/stat") for pid in pids.recv()]
    process.join()
    until = time.monotonic() + 20
    while any(file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z" for file in files):
        assert time.monotonic() < until
        time.sleep(0.05)
