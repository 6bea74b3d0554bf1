"""Lagrangian self-distillation (LSD)."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.derivatives import velocity_difference, velocity_jvp
from flowmaps.flow_map import FlowMap
from flowmaps.networks.conditioning import without_label
from flowmaps.objectives.base import DerivativeRole, Draws, new_option, rms
from flowmaps.objectives.self_distillation import OffDiagonalBatch, SelfDistillation
from flowmaps.objectives.time_sampling import Times, TimeSampling
from samplers.callables import Drift, expand


class Derivative(enum.Enum):
    """Method of taking d_t v."""

    exact = "exact"  # forward-mode differentiation
    finite = "finite"  # a central difference: cheaper, IEEE float32 only, error about 1e-3


@dataclass
class Lagrangian(TimeSampling, SelfDistillation):
    r"""$r = \partial_t X_{s,t}(I_s) - \mathrm{sg}[v_{t,t}(X_{s,t}(I_s))]$: the map moves with the drift where it ends.

    Boffi et al. 2025 (arXiv 2505.18825), algorithm 2. The gradient flows through $v_{s,t}$ and its t-derivative
    (reverse over forward); the velocity at the end point and the point itself are constants. ``slim`` makes the
    t-derivative a constant too (arXiv 2609.16222): about half the cost, and worse in one step.
    """

    slim: bool = False
    derivative: Derivative = Derivative.exact

    @property
    def uses_teacher(self) -> bool:
        return True

    @property
    def derivative_role(self) -> DerivativeRole:
        if self.derivative is Derivative.finite:
            return DerivativeRole.finite
        return DerivativeRole.constant if self.slim else DerivativeRole.trained

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label = batch.x, batch.s, batch.t, batch.label
        if self.derivative is Derivative.exact:
            v, dv = velocity_jvp(fm, x, s, t, label, dt=1.0, constant=self.slim)
        else:
            v, dv = velocity_difference(fm, x, s, t, label)
        terms["jvp_norm"] = rms(dv)
        gap = expand(t - s, x)
        target = self.target_drift(fm, teacher, x + gap * v.detach(), t, label)
        return v + gap * (dv.detach() if self.slim else dv) - target


@dataclass
class TerminalVelocity(Lagrangian):
    r"""Lagrangian self-distillation whose end-point velocity comes from a moving average of the weights.

    Terminal Velocity Matching (arXiv 2511.19797): $r = \partial_t X_{s,t}(I_s) - \mathrm{sg}[v'_{t,t}(X_{s,t}(I_s))]$,
    where v' has weights averaged at decay ``teacher_ema`` and the point comes from the live weights. The trainer keeps
    the average and passes it as ``teacher``. Under guidance w the average also gives the drift without a label, the
    target is not mixed, and the losses of guided rows are divided by w^2, by which the target's variance has grown.
    """

    diagonal: float = 0.5
    times: Times = Times.gap
    time_mean: tuple[float, float] = (0.4, -0.8)
    teacher_ema: float = 0.99
    guidance_mix: float = new_option(0.0, before=0.0)

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        losses = super().row_losses(fm, x1, label, draws, teacher, terms)
        if draws.guidance is None or label is None:
            return losses
        _, has_label = without_label(label, fm.info.label_size)
        return losses / torch.where(has_label, draws.guidance, 1.0) ** 2
