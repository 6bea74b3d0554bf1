"""This process among those that torchrun or accelerate started, and how they share work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, pad_across_processes, reduce
from torch import Tensor

from flowmaps.metrics import FeatureStats

ON_CPU = not torch.accelerator.is_available()  # accelerate joins processes without an accelerator only if told so
T = TypeVar("T")


def processes() -> PartialState:
    """How many processes there are, which one this is, and barriers between them."""
    return PartialState(cpu=ON_CPU)


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """Processes that share numbered items, each taking a run of them; all methods but ``share`` are collective."""

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> range:
        """The items of 0 .. n - 1 that are this process's, one after another; the first process has some if n > 0."""
        each, more = divmod(n, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def told(self, value: T) -> T:
        """What the first process says."""
        values = [value]
        if self.size > 1:
            broadcast_object_list(values)
        return values[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others do."""
        if self.rank:
            self.told(None)
        yield
        if not self.rank:
            self.told(None)

    def joined(self, x: Tensor) -> Tensor:
        """The rows of all processes, in order."""
        if self.size == 1:
            return x
        device = processes().device
        rows = gather(torch.tensor([len(x)], device=device)).tolist()
        parts = gather(pad_across_processes(x.to(device).contiguous()))
        each = torch.split(parts, max(rows))
        return torch.cat([part[:n] for part, n in zip(each, rows, strict=True)]).to(x.device)

    def merged(self, stats: FeatureStats) -> FeatureStats:
        """The statistics of all processes' features: moments by sums over them, what is kept in order."""
        if self.size == 1:
            return stats
        device, n = processes().device, stats.n or 0

        def total(x: Tensor) -> Tensor:
            summed: Tensor = reduce(x.to(device), "sum")
            return summed.cpu()

        count = total(torch.tensor([n]))
        mean = total(n * stats.mean) / count
        away = stats.mean - mean
        scatter = total(stats.scatter + n * torch.outer(away, away))
        whole = FeatureStats(stats.dim, stats.origin)
        whole.n, whole.mean, whole.scatter = int(count), mean, scatter
        if (features := stats.features) is not None:
            whole.features = self.joined(features)
        return whole


class AnyProcess:
    """Whether a flag is set in any process, so that all leave the loop at the same step.

    All ask once a step. In a run of several the answer is that to the question of the step before, so that none waits.
    """

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        state, told = processes(), False
        if state.num_processes == 1:
            return flag
        if self._asked is not None:
            work, flags = self._asked
            work.wait()
            told = bool(flags.any())
        flags = torch.tensor([int(flag)], device=state.device)
        self._asked = torch.distributed.all_reduce(flags, async_op=True), flags
        return told


ALONE = Team()


def team() -> Team:
    """All processes."""
    state = processes()
    return Team(state.process_index, state.num_processes)
