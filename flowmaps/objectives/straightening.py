"""Straightening: make a drift's path straight between the times at which it will be sampled."""

import enum
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Rows
from flowmaps.objectives.trajectory import PathObjective
from flowmaps.step_sizes import read_schedule
from samplers.callables import Drift, expand
from samplers.schedule import Schedule
from samplers.trajectories import Trajectory


class State(enum.Enum):
    """Where the drift is trained."""

    path = "path"  # on the teacher's path: straightening
    chord = "chord"  # on the straight line between its two ends: reflow


@dataclass(frozen=True)
class Straightening(PathObjective):
    """r = v_{s,s}(x_s) - (x_t - x_s) / (t - s) for the segments [s, t] of coarse grids on a teacher's fine trajectory.

    The drift's Euler step at s then ends where the path does: Nguyen et al. 2024 (arXiv 2312.16414), section 3.3. The
    grids are those of the file ``schedule`` (of scripts/schedule.py; empty: equal steps) of ``steps`` steps, one or
    several numbers, all of the file's by default; with neither, every interval of the trajectory is a segment. Each
    trajectory gives a row for each segment. ``state`` = chord is reflow (Liu et al. 2022, arXiv 2209.03003) at the same
    times: x_s = (1 - s) x_0 + s x_1 with the trajectory's two ends, whose mean velocity is x_1 - x_0 everywhere.
    """

    steps: tuple[int, ...] = ()
    schedule: str = ""
    state: State = State.path

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(steps < 1 for steps in self.steps) or len(set(self.steps)) < len(self.steps):
            raise UserError(f"objective.steps are different step counts of at least 1, got {self.steps}")
        if self.schedule and self.grids.sampler not in ("", "euler"):
            raise UserError(f"objective.schedule={self.schedule} is for the sampler {self.grids.sampler}, not euler")

    @cached_property
    def grids(self) -> Schedule:
        """The coarse grids by their number of steps; none where every interval is a segment."""
        if not self.schedule:
            return Schedule.uniform(*self.steps)
        stored = read_schedule(self.schedule, "objective.schedule")
        if missing := [steps for steps in self.steps if steps not in stored]:
            have = ", ".join(map(str, stored))
            raise UserError(f"objective.steps={missing[0]}, but objective.schedule={self.schedule} has {have}")
        return stored.only(*self.steps) if self.steps else stored

    @property
    def kind(self) -> str:
        return "drift"

    @property
    def schedules(self) -> dict[str, Schedule]:
        return {"euler": self.grids} if self.schedule else {}

    def rows(self, times: Tensor) -> int:
        return sum(self.grids) or len(times) - 1

    def pieces(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        starts, ends = self.segments(times)
        return starts.to(row.device)[row], ends.to(row.device)[row]

    def segments(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the segments' two ends in the fine grid ``times`` [N + 1], which must have all of them."""
        if not self.grids:
            whole = torch.arange(len(times))
            return whole[:-1], whole[1:]
        nodes = []
        for steps, grid in self.grids.items():
            away = (grid[:, None] - times.cpu().double()).abs()  # [steps + 1, N + 1]
            if bool((away.amin(dim=1) > 1e-6).any()):
                raise UserError(
                    f"objective.schedule={self.schedule or 'uniform'}: the grid of {steps} steps has times that the "
                    f"trajectory of {len(times) - 1} steps has not; give it trajectories.steps that has them"
                )
            nodes.append(away.argmin(dim=1))
        return torch.cat([n[:-1] for n in nodes]), torch.cat([n[1:] for n in nodes])

    def states(self, path: Trajectory) -> Tensor:
        if self.state is State.path:
            return path.states
        shares = (path.times - path.times[0]) / (path.times[-1] - path.times[0])
        shares = shares.to(path.states).view(-1, *[1] * (path.states.ndim - 1))
        return torch.lerp(path.states[:1], path.states[-1:], shares)

    def check(self, shape: tuple[int, ...], times: Tensor, device: torch.device) -> None:
        self.segments(times)

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        return fm.drift(rows.x0, rows.s, rows.label) - (rows.x1 - rows.x0) / expand(rows.t - rows.s, rows.x0)
