"""The base of objectives that learn from a teacher's solver trajectories instead of data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.conditions import condition_rows
from flowmaps.objectives.base import Objective, Segments, mean_square
from samplers.callables import Drift, rounded
from samplers.trajectories import Trajectory


@dataclass
class TrajectoryObjective(Objective):
    """Regression on segments of a teacher's trajectories $x_0, ..., x_N$ at times $t_0 < ... < t_N$.

    Targets are states of the trajectory, so they do not move with v. Each training row is a segment from the state
    $x_s$ at s to the state $x_t$ at t. The network's own dropout is on.
    """

    @property
    def uses_teacher(self) -> bool:
        return True

    def rows(self, times: Tensor) -> int:
        """Return the number of training rows per trajectory with ``times`` [N + 1]."""
        return len(times) - 1

    def segment_indices(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (i, j) of the two ends of segments ``row`` [n], from uniform numbers [2, n]."""
        raise NotImplementedError

    def states(self, path: Trajectory) -> Tensor:
        """Return the states [N + 1, M, ...] at which segments begin and end."""
        return path.states

    def prepare(
        self,
        fm: FlowMap,
        batch: Tensor | Trajectory,
        label: Tensor | None,
        generator: torch.Generator,
        step: int = 0,
    ) -> tuple[Tensor, Tensor | None, Segments]:
        """Return the ends x_t of all segments of M trajectories, one trajectory after the other, labels and starts."""
        if not isinstance(batch, Trajectory):
            raise UserError("this objective learns from a Trajectory, not from data")
        states, rows, paths = self.states(batch), self.rows(batch.times), batch.states.shape[1]
        times = rounded(batch.times, states).to(states.device, non_blocking=True)
        index = torch.arange(rows * paths, device=states.device)
        path, row = index // rows, index % rows
        uniform = torch.rand(2, len(index), generator=generator, device=states.device, dtype=times.dtype)
        i, j = self.segment_indices(batch.times, row, uniform)
        label = condition_rows(batch.label, fm.info.condition)
        label = None if label is None else label[path]
        return states[j, path], label, Segments(states[i, path], times[i], times[j])

    def row_losses(
        self,
        fm: FlowMap,
        x_t: Tensor,
        label: Tensor | None,
        draws: Segments,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        losses = self.error(self.residual(fm, draws, x_t, label), x_t)
        terms["off_diagonal"] = losses.detach().mean()
        return losses

    def residual(self, fm: FlowMap, segments: Segments, x_t: Tensor, label: Tensor | None) -> Tensor:
        """Return the residual [n, ...] of segments that end at x_t [n, ...]."""
        raise NotImplementedError

    def error(self, residual: Tensor, x_t: Tensor) -> Tensor:
        """Return the loss of each residual: [n, ...] -> [n]."""
        return mean_square(residual)

    def check_times(self, times: Tensor) -> None:
        """Refuse, before any training, times of trajectories that the objective cannot take."""
