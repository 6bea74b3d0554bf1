"""What objectives share that learn from a teacher's solver paths instead of data."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Draws, Dropout, Objective
from flowmaps.objectives.time_sampling import Times
from samplers.trajectories import Trajectory


def usual_dropout(network: nn.Module) -> AbstractContextManager[None]:
    """The network's own dropout, a mask for each pass."""
    return nullcontext()


@dataclass(frozen=True)
class PathObjective(Objective):
    """Regression on pieces of a teacher's trajectories x_0, ..., x_N at times t_0 < ... < t_N; no target moves with v.

    Each of a trajectory's ``rows`` is a piece from (s, x_s) to (t, x_t), of which ``Rows`` has x0 = x_s and x1 = x_t.
    """

    dropout: ClassVar[Dropout] = usual_dropout

    diagonal: float = field(default=0.0, init=False)
    adaptive: float = field(default=0.0, init=False)
    teacher_ema: float = field(default=0.0, init=False)
    guidance: float = field(default=1.0, init=False)
    guidance_max: float = field(default=1.0, init=False)
    guidance_times: tuple[float, float] = field(default=(0.0, 1.0), init=False)
    times: Times = field(default=Times.triangle, init=False)  # the trajectory's times take its place
    time_mean: tuple[float, float] = field(default=(0.4, 0.4), init=False)
    time_std: tuple[float, float] = field(default=(1.0, 1.0), init=False)

    @property
    def taught(self) -> bool:
        return True

    def rows(self, times: Tensor) -> int:
        """Training rows of one trajectory at ``times`` [N + 1]."""
        return len(times) - 1

    def pieces(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (i, j) of the ends of pieces ``row`` [n] of a trajectory; ``uniform`` [2, n] is to draw with."""
        raise NotImplementedError

    def states(self, path: Trajectory) -> Tensor:
        """The states [N + 1, M, ...] that pieces begin and end with."""
        return path.states

    def prepare(
        self,
        fm: FlowMap,
        batch: Tensor | Trajectory,
        label: Tensor | None,
        generator: torch.Generator,
        step: int = 0,
    ) -> tuple[Tensor, Tensor | None, Draws]:
        """All rows of the M trajectories of ``batch``, one trajectory after the other."""
        if not isinstance(batch, Trajectory):
            raise UserError("this objective learns from a Trajectory, not from data")
        states, rows, paths = self.states(batch), self.rows(batch.times), batch.states.shape[1]
        times = batch.times.to(states.device, torch.promote_types(states.dtype, torch.float32))
        index = torch.arange(rows * paths, device=states.device)
        path, row = index // rows, index % rows
        uniform = torch.rand(2, len(index), generator=generator, device=states.device, dtype=times.dtype)
        i, j = self.pieces(times, row, uniform)
        label = None if batch.label is None else batch.label[path]
        return states[j, path], label, Draws(states[i, path], times[i], times[j], uniform[0])

    def check(self, shape: tuple[int, ...], times: Tensor, device: torch.device) -> None:
        """Refuse, before any training, samples of ``shape``, times or weight files that the objective cannot take."""
