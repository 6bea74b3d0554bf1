"""Self-distillation by one small step along the conditional velocity: SoFlow and alpha-Flow. No derivative is taken."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.layers import shared_dropout
from flowmaps.objectives.base import DerivativeRole, Draws, Segments
from flowmaps.objectives.eulerian import slim_residual
from flowmaps.objectives.self_distillation import OffDiagonalBatch, SelfDistillation
from flowmaps.objectives.time_sampling import LEAST_GAP, DiagonalDraw, Times, TimeSampling
from samplers.callables import Drift, expand


@dataclass
class SmallStep(TimeSampling, SelfDistillation):
    r"""$r = v_{s,t}(I_s) - \mathrm{sg}[a g + (1 - a) v_{m,t}(I_s + (m - s) g)]$.

    The times are s, m = s + a (t - s) and t, and $g = dI_s/ds$. The jump to t equals a small step along the conditional
    velocity g (guided, if guidance is on) and the jump from there. Both jumps are evaluated in at least float32, since
    they differ by O(a). The share a falls over training, ``alpha(step)``, and travels in ``Draws.gamma``. As a -> 0, r
    / a tends to MeanFlow's residual with an error of O(a), and its mean given I_s is O(a) at the exact map; at a = 1
    this is flow matching for every pair of times.

    The adaptive weight has another form than elsewhere: see ``adapted``.
    """

    adaptive: float = 1.0  # power p of the weight in ``adapted``
    alpha_steps: int = 0  # training steps that the schedule of a covers; 0: those of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_steps < 0:
            raise UserError("must not be negative", field="alpha_steps", value=self.alpha_steps)

    def for_run(self, steps: int) -> Self:
        return dataclasses.replace(self, alpha_steps=self.alpha_steps or steps)

    def progress(self, step: int) -> float:
        """Return the share of the schedule that is done at training step ``step``."""
        if step and not self.alpha_steps:
            raise UserError("the length of the run is not known here: say how many steps", "alpha_steps", 0)
        return min(1.0, step / self.alpha_steps) if step else 0.0

    def alpha(self, step: int) -> float:
        """Return the share a at training step ``step``."""
        raise NotImplementedError

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        draws, a = super().draw(fm, x1, generator, step), self.alpha(step)
        return draws._replace(gamma=torch.full_like(draws.s, a) if a else None)

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label, g = batch.x, batch.s, batch.t, batch.label, batch.conditional_velocity
        if batch.gamma is None:
            return slim_residual(fm, batch, g, g, terms)
        middle = torch.minimum(s + batch.gamma * (t - s), t)  # by rounding
        with torch.autocast(x.device.type, enabled=False):
            v = fm.velocity(x, s, t, label)
            with torch.no_grad():
                later = fm.velocity(x + expand(middle - s, x) * g, middle, t, label)
        return v - self.target(torch.lerp(later, g.to(later.dtype), expand(batch.gamma, later)))

    def target(self, target: Tensor) -> Tensor:
        """Return the target as the method uses it."""
        return target

    def floor(self, a: Tensor) -> Tensor:
        """Return the constant under the adaptive weight of rows with share a [B]."""
        return torch.full_like(a, self.adaptive_floor)

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        """Return a^(2p - 1) |r|^2 / sg[|r|^2 + floor(a)]^p per row, the |r|^2 averaged over dimensions.

        a = 1 on the diagonal, and where the derivative has replaced the step.
        """
        a = torch.ones_like(losses)
        if isinstance(draws, Draws) and draws.gamma is not None:
            a = torch.where(draws.s < draws.t, draws.gamma, a)
        weight = a ** (2 * self.adaptive - 1) * (losses.detach() + self.floor(a)) ** -self.adaptive
        return losses * weight


@dataclass
class SoFlow(SmallStep):
    r"""Solution flow models, Luo et al. 2025 (arXiv 2512.15657): a falls geometrically to its small last value.

    $a_k = a_0 (a_1 / a_0)^{k/K}$ at step k of K, and m - s is at least 1e-4. Off the diagonal the gradient is that of
    the paper's $\mathrm{sg}[q] \cdot v / \mathrm{sg}[|q|^2 + c]^p$ with q = r / a, the difference quotient of the two
    maps: half the square there, and the square itself on the diagonal. Both jumps have the same dropout.
    """

    times: Times = Times.raised
    time_mean: tuple[float, ...] = (-0.2, 1.0, 0.2)
    time_std: tuple[float, ...] = (0.8, 0.8, 1.0)
    diagonal_draw: DiagonalDraw = DiagonalDraw.own
    adaptive_floor: float = 0.01  # c
    alpha_start: float = 0.1  # a_0
    alpha_end: float = 0.002  # a_1
    off_diagonal_dropout = staticmethod(shared_dropout)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha_start <= 1:
            raise UserError("a share must lie in (0, 1]", field="alpha_start", value=self.alpha_start)
        if not 0 < self.alpha_end <= self.alpha_start:
            raise UserError("must be positive, and not above alpha_start", field="alpha_end", value=self.alpha_end)

    def alpha(self, step: int) -> float:
        return float(self.alpha_start * (self.alpha_end / self.alpha_start) ** self.progress(step))

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        draws = super().draw(fm, x1, generator, step)
        least = (LEAST_GAP / (draws.t - draws.s)).clamp(self.alpha(step), 1)
        return draws._replace(gamma=least)

    def floor(self, a: Tensor) -> Tensor:
        return a**2 * self.adaptive_floor

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        half = torch.where(draws.s < draws.t, 0.5, 1.0).to(losses.dtype)
        return half * super().adapted(losses, draws, dimensions)


@dataclass
class AlphaFlow(SmallStep):
    """alpha-Flow, Zhang et al. 2025 (arXiv 2510.20771): a falls along a sigmoid from flow matching to MeanFlow.

    a = 1 - sigmoid(25 (p - 1/2)), where p runs from 0 to 1 between the two shares of the schedule in ``ramp``. It is 1
    where it is above 0.995, and 0 where below 0.005: there MeanFlow's derivative takes the place of the step. The
    target of a step is clamped.
    """

    times: Times = Times.logit_normal
    ramp: tuple[float, float] = (0.0, 1.0)
    target_limit: float = 4.0  # largest |target| of a coordinate; 0: no limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ramp) != 2 or not 0 <= self.ramp[0] < self.ramp[1] <= 1:
            raise UserError("must be two shares in order from 0 to 1", field="ramp", value=self.ramp)
        if self.target_limit < 0:
            raise UserError("must not be negative", field="target_limit", value=self.target_limit)

    @property
    def derivative_role(self) -> DerivativeRole:
        return DerivativeRole.constant

    def alpha(self, step: int) -> float:
        start, end = self.ramp
        p = min(1.0, max(0.0, (self.progress(step) - start) / (end - start)))
        a = 1 / (1 + math.exp(25 * (p - 0.5)))
        return 0.0 if a < 0.005 else 1.0 if a > 0.995 else a

    def target(self, target: Tensor) -> Tensor:
        return target.clamp(-self.target_limit, self.target_limit) if self.target_limit else target
