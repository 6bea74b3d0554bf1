"""Consistency mid-training (CMT): learn jumps from the solver trajectories of a teacher, by plain regression."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.metrics.lpips import lpips
from flowmaps.objectives.base import Rows, mean_square
from flowmaps.objectives.trajectory import PathObjective
from samplers.callables import Drift, expand


class Target(enum.Enum):
    """What a state of the trajectory is carried to."""

    pairs = "pairs"  # another, later state: the map between any two times
    endpoint = "endpoint"  # the last state: the map to data alone


class Distance(enum.Enum):
    """What is minimised of a residual r, a mean over a sample's dimensions."""

    l2 = "l2"  # mean of r^2
    l1 = "l1"  # mean of |r|
    huber = "huber"  # sqrt(mean of r^2 + huber^2) - huber
    lpips = "lpips"  # of the two images, by VGG-16


@dataclass(frozen=True)
class MidTraining(PathObjective):
    """Regression on states x_0, ..., x_N of a teacher's trajectories at times t_0 < ... < t_N; nothing moves with v.

    ``target`` = pairs: r = v_{t_i,t_j}(x_i) - (x_j - x_i) / (t_j - t_i), the average velocity of the piece.
    ``target`` = endpoint: r = X_{t_i,t_N}(x_i) - x_N, which trains a consistency model.
    Hu et al. 2025 (arXiv 2509.24526), section 3. Every state but the last is the start of one row, so that a trajectory
    of N steps gives N rows. For pairs, j is uniform on i + 1 .. N, and N itself in a share ``to_end`` of the rows: with
    none, as published, one row in N^2 has the jump from noise to data.

    ``distance`` = lpips compares images X_{t_i,t_N}(x_i) and x_N; ``lpips_weights`` is the folder of its weight files.
    """

    target: Target = Target.pairs
    to_end: float = 0.0  # for pairs
    distance: Distance = Distance.l2
    huber: float = 5.4e-4  # a dimension's share of 5.4e-4 sqrt(dimensions), arXiv 2310.14189
    lpips_weights: str = ""  # empty: where torch.hub keeps downloads

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is Target.pairs and self.distance is Distance.lpips:
            raise UserError("objective.distance=lpips compares images: it needs objective.target=endpoint")
        if not 0 <= self.to_end <= 1 or (self.to_end and self.target is Target.endpoint):
            raise UserError(f"objective.to_end is a share, for objective.target=pairs, got {self.to_end}")
        if not self.huber >= 0:
            raise UserError(f"objective.huber must not be negative, got {self.huber}")
        if self.lpips_weights and self.distance is not Distance.lpips:
            raise UserError("objective.lpips_weights mean nothing without objective.distance=lpips")

    @property
    def kind(self) -> str:
        return "consistency" if self.target is Target.endpoint else "map"

    def pieces(self, times: Tensor, row: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        last = len(times) - 1
        j = torch.full_like(row, last)
        if self.target is Target.pairs:
            later = torch.minimum(row + 1 + (uniform[0] * (last - row)).long(), j)
            j = torch.where(uniform[1] < self.to_end, j, later)
        return row, j

    def check(self, shape: tuple[int, ...], times: Tensor, device: torch.device) -> None:
        if self.distance is Distance.lpips:
            if len(shape) != 3:
                raise UserError("objective.distance=lpips compares images, these samples are points")
            image = torch.zeros(1, *shape, device=device)
            lpips(self.lpips_weights, device)(image, image)

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        """``rows.x0`` at s and ``rows.x1`` at t are the two ends of a piece of a trajectory."""
        gap = expand(rows.t - rows.s, rows.x0)
        v = fm.velocity(rows.x0, rows.s, rows.t, rows.label)
        if self.target is Target.endpoint:
            return rows.x0 + gap * v - rows.x1
        return v - (rows.x1 - rows.x0) / gap

    def error(self, residual: Tensor, rows: Rows) -> Tensor:
        if self.distance is Distance.lpips:
            distance: Tensor = self.seen(rows.x1 + residual, rows.x1)
            return distance
        if self.distance is Distance.l1:
            return residual.to(torch.promote_types(residual.dtype, torch.float32)).abs().flatten(1).mean(dim=1)
        squared = mean_square(residual)
        if self.distance is Distance.huber:
            return (squared + self.huber**2).sqrt() - self.huber
        return squared

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def seen(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS of two batches of images: [n]; runs eagerly in a compiled loss."""
        return lpips(self.lpips_weights, x.device)(x, y)
