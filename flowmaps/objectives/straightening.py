"""Straightening: make a drift's paths straight between the times at which it will be sampled."""

import enum
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Segments
from flowmaps.objectives.trajectory import TrajectoryObjective
from flowmaps.step_sizes import read_schedule
from samplers.callables import expand
from samplers.schedule import Schedule
from samplers.trajectories import Trajectory


class TrainPoint(enum.Enum):
    """The points at which the drift is trained."""

    path = "path"  # on the teacher's path: straightening
    chord = "chord"  # on the straight line between the path's two ends: reflow


@dataclass
class Straightening(TrajectoryObjective):
    """$r = v_{s,s}(x_s) - (x_t - x_s) / (t - s)$ for segments [s, t] of a teacher's trajectory.

    The segments are those of coarse grids on a fine trajectory. The drift's Euler step at s then ends where the path
    does: Nguyen et al. 2024 (arXiv 2312.16414), section 3.3. ``steps`` holds the step counts of the coarse grids. Their
    times come from the file ``schedule``, written by scripts/schedule.py, all of its grids by default; without a file
    the steps are equal; with neither, every interval of the trajectory is a segment. Each trajectory gives one row per
    segment. ``state`` = chord is reflow (Liu et al. 2022, arXiv 2209.03003) at the same times: $x_s = (1 - s) x_0 + s
    x_1$ with the trajectory's two ends, whose mean velocity is $x_1 - x_0$ everywhere.
    """

    steps: tuple[int, ...] = ()
    schedule: str = ""
    state: TrainPoint = TrainPoint.path

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(steps < 1 for steps in self.steps) or len(set(self.steps)) < len(self.steps):
            raise UserError("must be different step counts of at least 1", field="steps", value=self.steps)
        if self.schedule and self.grids.sampler not in ("", "euler"):
            raise UserError(f"fitted for the sampler {self.grids.sampler}, not euler", "schedule", self.schedule)

    @cached_property
    def grids(self) -> Schedule:
        """The coarse grids by number of steps, empty if every interval is a segment.

        The file is read once. After a change of options, ``dataclasses.replace(objective)`` reads it again.
        """
        if not self.schedule:
            return Schedule.uniform(*self.steps)
        stored = read_schedule(self.schedule)
        if missing := [steps for steps in self.steps if steps not in stored]:
            have = ", ".join(map(str, stored))
            raise UserError(f"schedule={self.schedule} has {have} steps", field="steps", value=missing[0])
        return stored.only(*self.steps) if self.steps else stored

    @property
    def kind(self) -> str:
        return "drift"

    @property
    def schedules(self) -> dict[str, Schedule]:
        return {"euler": self.grids} if self.schedule else {}

    def rows(self, times: Tensor) -> int:
        return sum(self.grids) or len(times) - 1

    def segment_indices(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        starts, ends = (index.to(row.device, non_blocking=True) for index in self.segments(times))
        return starts[row], ends[row]

    def segments(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the segments' two ends in the fine grid ``times`` [N + 1], which must contain them."""
        if not self.grids:
            every = torch.arange(len(times))
            return every[:-1], every[1:]
        nodes = []
        for steps, grid in self.grids.items():
            away = (grid[:, None] - times.cpu().double()).abs()  # [steps + 1, N + 1]
            if bool((away.amin(dim=1) > 1e-6).any()):
                raise UserError(
                    f"the grid of {steps} steps has times that are missing from the trajectory of {len(times) - 1} "
                    "steps: choose trajectories.steps so that the grid is a subset",
                    field="schedule",
                    value=self.schedule or "uniform",
                )
            nodes.append(away.argmin(dim=1))
        return torch.cat([n[:-1] for n in nodes]), torch.cat([n[1:] for n in nodes])

    def states(self, path: Trajectory) -> Tensor:
        if self.state is TrainPoint.path:
            return path.states
        shares = (path.times - path.times[0]) / (path.times[-1] - path.times[0])
        shares = shares.to(path.states, non_blocking=True).view(-1, *[1] * (path.states.ndim - 1))
        return torch.lerp(path.states[:1], path.states[-1:], shares)

    def check_times(self, times: Tensor) -> None:
        self.segments(times)

    def residual(self, fm: FlowMap, segments: Segments, x_t: Tensor, label: Tensor | None) -> Tensor:
        x_s, s, t = segments
        return fm.drift(x_s, s, label) - (x_t - x_s) / expand(t - s, x_s)
