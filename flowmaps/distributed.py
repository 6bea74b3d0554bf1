"""The processes that torchrun or accelerate started, and how they share work."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, pad_across_processes, reduce
from torch import Tensor

from flowmaps.metrics import FeatureStats

ON_CPU = not torch.accelerator.is_available()  # without an accelerator, accelerate joins processes only on request
T = TypeVar("T")


def processes() -> PartialState:
    """The state of all processes: how many there are, the rank of this one, barriers."""
    return PartialState(cpu=ON_CPU)


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
