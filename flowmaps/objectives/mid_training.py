"""Consistency mid-training (CMT): learn jumps from the solver trajectories of a teacher, by plain regression."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.metrics.lpips import lpips
from flowmaps.objectives.base import Segments, mean_square
from flowmaps.objectives.trajectory import TrajectoryObjective
from samplers.callables import expand


class Target(enum.Enum):
    """The state that an earlier state of the trajectory is carried to."""

    pairs = "pairs"  # another, later state: the map between any two times
    endpoint = "endpoint"  # the last state: the map to data alone


class Distance(enum.Enum):
    """Loss of a residual r; means are over a sample's dimensions."""

    l2 = "l2"  # mean of r^2
    l1 = "l1"  # mean of |r|
    huber = "huber"  # sqrt(mean of r^2 + huber^2) - huber
    lpips = "lpips"  # LPIPS of the two images, with VGG-16


@dataclass
class MidTraining(TrajectoryObjective):
    """Regression on states $x_0, ..., x_N$ of a teacher's trajectories at times $t_0 < ... < t_N$.

    - ``target`` = pairs: $r = v_{t_i,t_j}(x_i) - (x_j - x_i) / (t_j - t_i)$, the average velocity of the segment.
    - ``target`` = endpoint: $r = X_{t_i,t_N}(x_i) - x_N$, which trains a consistency model.

    Hu et al. 2025 (arXiv 2509.24526), section 3. Every state but the last starts one row, so a trajectory of N steps
    gives N rows. For pairs, j is uniform on i + 1 .. N, except that a share ``to_end`` of the rows has j = N: with
    to_end = 0, as published, one row in N^2 has the jump from noise to data.

    ``distance`` = lpips compares images $X_{t_i,t_N}(x_i)$ and $x_N$; ``lpips_weights`` is the folder of its weight
    files.
    """

    target: Target = Target.pairs
    to_end: float = 0.0  # for pairs
    distance: Distance = Distance.l2
    huber: float = 5.4e-4  # 5.4e-4 sqrt(dimensions) of arXiv 2310.14189, per dimension
    lpips_weights: str = ""  # empty: torch.hub's download folder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is Target.pairs and self.distance is Distance.lpips:
            raise UserError("compares images: set target=endpoint", field="distance", value="lpips")
        if not 0 <= self.to_end <= 1 or (self.to_end and self.target is Target.endpoint):
            raise UserError("a share in [0, 1], for target=pairs only", field="to_end", value=self.to_end)
        if not self.huber >= 0:
            raise UserError("must not be negative", field="huber", value=self.huber)
        if self.lpips_weights and self.distance is not Distance.lpips:
            raise UserError("has no effect without distance=lpips", field="lpips_weights", value=self.lpips_weights)

    @property
    def kind(self) -> str:
        return "consistency" if self.target is Target.endpoint else "map"

    def segment_indices(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        last = len(times) - 1
        j = torch.full_like(row, last)
        if self.target is Target.pairs:
            later = torch.minimum(row + 1 + (uniform[0] * (last - row)).long(), j)
            j = torch.where(uniform[1] < self.to_end, j, later)
        return row, j

    def check_samples(self, shape: tuple[int, ...], device: torch.device) -> None:
        if self.distance is Distance.lpips:
            if len(shape) != 3:
                raise UserError("compares images, but these samples are points", field="distance", value="lpips")
            image = torch.zeros(1, *shape, device=device)
            lpips(self.lpips_weights, device)(image, image)

    def residual(self, fm: FlowMap, segments: Segments, x_t: Tensor, label: Tensor | None) -> Tensor:
        x_s, s, t = segments
        gap = expand(t - s, x_s)
        v = fm.velocity(x_s, s, t, label)
        if self.target is Target.endpoint:
            return x_s + gap * v - x_t
        return v - (x_t - x_s) / gap

    def error(self, residual: Tensor, x_t: Tensor) -> Tensor:
        if self.distance is Distance.lpips:
            distance: Tensor = self.lpips(x_t + residual, x_t)
            return distance
        if self.distance is Distance.l1:
            return residual.to(torch.promote_types(residual.dtype, torch.float32)).abs().flatten(1).mean(dim=1)
        squared = mean_square(residual)
        if self.distance is Distance.huber:
            return (squared + self.huber**2).sqrt() - self.huber
        return squared

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lpips(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the LPIPS of two batches of images [n]; runs eagerly in a compiled loss."""
        return lpips(self.lpips_weights, x.device)(x, y)
