"""Progressive self-distillation (PSD): one step learns two."""

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Objective, Rows
from flowmaps.objectives.time_sampling import Times
from samplers.callables import Drift, expand


class Middle(enum.Enum):
    """Where the intermediate time lies between s and t."""

    midpoint = "midpoint"
    uniform = "uniform"


@dataclass(frozen=True)
class Progressive(Objective):
    """r = v_{s,t}(I_s) - sg[ (1 - g) v_{s,u}(I_s) + g v_{u,t}( X_{s,u}(I_s) ) ] with u = g s + (1 - g) t.

    Boffi et al. 2025 (arXiv 2505.18825), algorithm 4, preconditioned: the semigroup residual is (t - s) times this.
    ``middle`` = midpoint has g = 1/2, uniform has g uniform on [0, 1]. No derivative is taken.
    """

    middle: Middle = Middle.midpoint

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label = rows.x, rows.s, rows.t, rows.label
        g = torch.full_like(s, 0.5) if self.middle is Middle.midpoint else rows.fraction
        u = g * s + (1 - g) * t
        with torch.no_grad():
            first = fm.velocity(x, s, u, label)
            second = fm.velocity(x + expand(u - s, x) * first, u, t, label)
            target = torch.lerp(first, second, expand(g, x).to(first.dtype))
        return fm.velocity(x, s, t, label) - target


@dataclass(frozen=True)
class Shortcut(Progressive):
    """Progressive self-distillation by midpoints on the dyadic grid: t - s = 2^-k, k = 0 .. ``levels`` - 1.

    Frans et al. 2024 (arXiv 2410.12557): k is uniform, s uniform among the multiples of t - s. All step counts 1, 2,
    4, ... up to 2^levels are then trained, and no others.
    """

    levels: int = 7
    times: Times = field(default=Times.triangle, init=False)  # the grid takes its place
    time_mean: tuple[float, float] = field(default=(0.4, 0.4), init=False)
    time_std: tuple[float, float] = field(default=(1.0, 1.0), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 20:
            raise UserError(f"objective.levels must lie in 1 .. 20, got {self.levels}")

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        k = (uniform[0] * self.levels).floor()
        gap = torch.exp2(-k)
        s = (uniform[1] / gap).floor() * gap
        return s, s + gap
