"""Progressive self-distillation (PSD): one step learns two."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.self_distillation import OffDiagonalBatch, SelfDistillation
from flowmaps.objectives.time_sampling import TimeSampling
from samplers.callables import Drift, expand


class IntermediateTime(enum.Enum):
    """Position of the intermediate time between s and t."""

    midpoint = "midpoint"
    uniform = "uniform"


@dataclass
class Semigroup(SelfDistillation):
    r"""One jump equals two: $r = v_{s,t}(I_s) - \mathrm{sg}[(1 - g) v_{s,u}(I_s) + g v_{u,t}(X_{s,u}(I_s))]$.

    u = g s + (1 - g) t lies between s and t.

    Boffi et al. 2025 (arXiv 2505.18825), algorithm 4, preconditioned: the semigroup residual is (t - s) times this.
    ``middle`` = midpoint has g = 1/2, uniform has g uniform on [0, 1]. No derivative is taken.
    """

    middle: IntermediateTime = IntermediateTime.midpoint

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label = batch.x, batch.s, batch.t, batch.label
        g = torch.full_like(s, 0.5) if self.middle is IntermediateTime.midpoint else batch.gamma
        assert g is not None  # drawn in every step
        u = g * s + (1 - g) * t
        with torch.no_grad():
            first = fm.velocity(x, s, u, label)
            second = fm.velocity(x + expand(u - s, x) * first, u, t, label)
            target = torch.lerp(first, second, expand(g, x).to(first.dtype))
        return fm.velocity(x, s, t, label) - target


@dataclass
class Progressive(TimeSampling, Semigroup):
    """Progressive self-distillation with times of any distribution."""


@dataclass
class Shortcut(Semigroup):
    """Progressive self-distillation by midpoints on the dyadic grid: $t - s = 2^{-k}$, k = 0 .. ``levels`` - 1.

    Frans et al. 2024 (arXiv 2410.12557): k is uniform, s uniform among the multiples of t - s. All step counts 1, 2,
    4, ... up to 2^levels are then trained, and no others.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 20:
            raise UserError("must lie in 1 .. 20", field="levels", value=self.levels)

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        k = (uniform[0] * self.levels).floor()
        gap = torch.exp2(-k)
        s = (uniform[1] / gap).floor() * gap
        return s, s + gap
