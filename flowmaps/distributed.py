"""The processes that torchrun or accelerate started, how they share work, and how an error of one ends all."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, pad_across_processes, reduce
from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.metrics import FeatureStats

ON_CPU = not torch.accelerator.is_available()  # without an accelerator, accelerate joins processes only on request
T = TypeVar("T")
HALF_AN_HOUR, LONGEST = 1800.0, 1e6  # seconds
_limits: dict[str, float] = {}  # "seconds" of ``join``


def processes() -> PartialState:
    """The state of all processes: how many there are, the rank of this one, barriers."""
    return PartialState(cpu=ON_CPU)


def join(timeout: Any) -> "Team":
    """Join the processes, each of which then waits for the others for ``timeout`` seconds at most, and return the team.

    The first call sets the limit, if ``processes`` was not called before. A timeout that is not a positive number
    counts as half an hour, so that the mistake is reported by all processes.
    """
    if not PartialState._shared_state:
        sound = isinstance(timeout, (int, float)) and 0 < timeout <= LONGEST
        _limits["seconds"] = timeout if sound else HALF_AN_HOUR
        PartialState(cpu=ON_CPU, timeout=timedelta(seconds=_limits["seconds"]))
    return team()


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """Processes that work together on numbered items; every method except ``split`` is collective.

    A team of one (``ALONE``) never communicates, so that a single process of many can use it.
    """

    rank: int = 0
    size: int = 1

    def split(self, n: int) -> range:
        """The contiguous part of the items 0 .. n - 1 for this process; the first process has some if n > 0."""
        each, more = divmod(n, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def broadcast(self, value: T) -> T:
        """Return the first process's ``value`` in every process."""
        values = [value]
        if self.size > 1:
            broadcast_object_list(values)
        return values[0]

    def check_same(self, values: dict[str, Any]) -> None:
        """Refuse, in every process, values that are not the same in all of them; the error's field is their name."""
        if self.size == 1:
            return
        first, *others = gather_object([values])
        for rank, theirs in enumerate(others, start=1):
            for name in dict.fromkeys((*first, *theirs)):
                a, b = (shorten(of.get(name, "nothing"), 60) for of in (first, theirs))
                if first.get(name) != theirs.get(name):
                    raise UserError(f"is {a} in process 0 and {b} in process {rank}: give all the same", field=name)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            processes().wait_for_everyone()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the first process before it runs in the others."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, in order."""
        if self.size == 1:
            return x
        device = processes().device
        rows = gather(torch.tensor([len(x)], device=device)).tolist()
        parts = gather(pad_across_processes(x.to(device).contiguous()))
        each = torch.split(parts, max(rows))
        return torch.cat([part[:n] for part, n in zip(each, rows, strict=True)]).to(x.device)

    def all_reduce_stats(self, stats: FeatureStats) -> FeatureStats:
        """Return the statistics of all processes' features: moments from their sums, kept features in order."""
        if self.size == 1:
            return stats
        device, n = processes().device, stats.n or 0

        def total(x: Tensor) -> Tensor:
            summed: Tensor = reduce(x.to(device), "sum")
            return summed.cpu()

        count = total(torch.tensor([n]))
        mean = total(n * stats.mean) / count
        shift = stats.mean - mean
        scatter = total(stats.scatter + n * torch.outer(shift, shift))
        merged = FeatureStats(stats.dim, stats.origin)
        merged.n, merged.mean, merged.scatter = int(count), mean, scatter
        if (features := stats.features) is not None:
            merged.features = self.all_gather(features)
        return merged


class AnyProcess:
    """Tell whether a flag is set in any process, so that all leave a loop at the same step.

    Call it once per step in every process. With several processes the answer is about the previous step, so that none
    of them waits.
    """

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None
        on_gpu = torch.cuda.is_available()
        self._stream: Any = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()  # type: ignore[no-untyped-call]

    def __call__(self, flag: bool) -> bool:
        state, answer = processes(), False
        if state.num_processes == 1:
            return flag
        if self._asked is not None:
            work, flags = self._asked
            with self._stream:  # on the usual one, reading would wait for all of the current step
                work.wait()
                answer = bool(flags.any())
        flags = torch.full((1,), int(flag), device=state.device)
        self._asked = torch.distributed.all_reduce(flags, async_op=True), flags
        return answer


ALONE = Team()


def team() -> Team:
    """Return the team of all processes."""
    state = processes()
    return Team(state.process_index, state.num_processes)


ERROR, ENDED = "flowmaps/error", "flowmaps/ended"  # keys of the store that the processes share
LINGER = 10.0  # seconds for which a process that ends by an error waits for the others to read it
POLL = 0.05  # seconds between two looks
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)


def settle(error: Exception, refused: UserError | None) -> UserError | None:
    """End the work of a process with others that ``error`` ends, and return the line to show, None for a bug.

    The first error goes to all processes: their collectives fail, and they show the same line.

    Args:
        error: What ended this process.
        refused: The line for it, None if it is not a mistake of the user.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        unmet = isinstance(error, torch.distributed.DistError)
        return UserError(f"the processes did not meet ({shorten(error)}): start all of them") if unmet else refused
    if torch.distributed.get_world_size() == 1:
        return refused
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.distributed_c10d._get_default_store()
    text = str(error)
    lost = refused is None and isinstance(error, RuntimeError) and bool(LOST.search(text))
    with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
        if not lost:
            line = refused or UserError(f"process {rank} failed ({type(error).__name__}: {shorten(error)})")
            _publish(store, line)
        elif store.check([ERROR]):
            refused = _published(store)
        elif waited := re.search(r"timed? ?out.*?(\d+) ?ms", text, re.IGNORECASE):
            reason = f"a process did not answer for {int(waited[1]) / 1000:g} s: it was stopped, or needs more time"
            refused = UserError(reason, "config.timeout", _limits["seconds"]) if _limits else UserError(reason)
            _publish(store, refused)
        if torch.distributed.get_backend() == "gloo":  # NCCL might wait for what it began
            torch.distributed.destroy_process_group()  # now the others' collectives fail
        until, ended = time.monotonic() + LINGER, store.add(ENDED, 1)
        while ended < size and time.monotonic() < until:
            time.sleep(POLL)
            ended = store.add(ENDED, 0)
        if rank == 0:
            time.sleep(4 * POLL)  # it may keep the store, in which the others look once more
    return refused or (UserError("another process ended: see what it says") if lost else None)


def _publish(store: Any, line: UserError) -> None:
    store.compare_set(
        ERROR, "", json.dumps([line.message, line.field, None if line.value is None else str(line.value)])
    )


def _published(store: Any) -> UserError:
    return UserError(*json.loads(store.get(ERROR)))
