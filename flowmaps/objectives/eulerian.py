"""Eulerian self-distillation (ESD), and MeanFlow, i.e. its slim form with another velocity."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.derivatives import velocity_jvp
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import DerivativeRole, Draws, Segments, rms
from flowmaps.objectives.self_distillation import OffDiagonalBatch, SelfDistillation
from flowmaps.objectives.time_sampling import Times, TimeSampling
from samplers.callables import Drift, expand


class StopGradient(enum.Enum):
    """The part of the Eulerian residual that is held constant."""

    advection = "advection"  # the term $\nabla X \cdot v_{s,s}$: the paper's recommendation
    velocity = "velocity"  # $v_{s,s}$ alone: the gradient also flows through the spatial derivative
    slim = "slim"  # all but $v_{s,t}$: no derivative is differentiated


@dataclass
class Eulerian(TimeSampling, SelfDistillation):
    r"""The end point stays as the start moves on.

    $r = \partial_s X_{s,t}(I_s) + \mathrm{sg}[\nabla X_{s,t}(I_s) \cdot v_{s,s}(I_s)]$, Boffi et al. 2025 (arXiv
    2505.18825), algorithm 3; ``stop`` = slim is the stop-gradient regression of arXiv 2609.16222, $r = v_{s,t} -
    \mathrm{sg}[v_{s,s} + (t - s) (\partial_s v + \nabla v \cdot v_{s,s})]$.
    """

    stop: StopGradient = StopGradient.advection

    @property
    def uses_teacher(self) -> bool:
        return True

    @property
    def derivative_role(self) -> DerivativeRole:
        return DerivativeRole.constant if self.stop is StopGradient.slim else DerivativeRole.trained

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label = batch.x, batch.s, batch.t, batch.label
        velocity = self.target_drift(fm, teacher, x, s, label)
        if self.stop is StopGradient.slim:
            return slim_residual(fm, batch, velocity, velocity, terms)
        if self.stop is StopGradient.velocity:
            v, dv = velocity_jvp(fm, x, s, t, label, dx=velocity, ds=1.0)
            terms["jvp_norm"] = rms(dv)
            return velocity - v + expand(t - s, x) * dv
        v, d_s = velocity_jvp(fm, x, s, t, label, ds=1.0)
        with torch.no_grad():
            d_x = velocity_jvp(fm, x, s, t, label, dx=velocity)[1]
        terms["jvp_norm"] = rms(d_s.detach() + d_x)
        gap = expand(t - s, x)
        return gap * d_s - v + (velocity + gap * d_x)


class Velocity(enum.Enum):
    """A velocity at (I_s, s)."""

    conditional = "conditional"  # $dI_s/ds$ of the row's noise and data
    model = "model"  # $v_{s,s}(I_s)$


@dataclass
class MeanFlow(TimeSampling, SelfDistillation):
    r"""$r = v_{s,t} - \mathrm{sg}[u + (t - s) (\partial_s v + \nabla v \cdot w)]$, conditional velocities u and w.

    Geng et al. 2025 (arXiv 2505.13447), the MeanFlow identity at this package's times and sign; u is
    ``target`` and w is ``tangent``.
    """

    times: Times = Times.logit_normal
    tangent: Velocity = Velocity.conditional
    target: Velocity = Velocity.conditional

    @property
    def uses_teacher(self) -> bool:
        return Velocity.model in (self.tangent, self.target)

    @property
    def derivative_role(self) -> DerivativeRole:
        return DerivativeRole.constant

    def velocities(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None) -> tuple[Tensor, Tensor]:
        """Return tangent and target [n, ...]."""
        choices = {Velocity.conditional: batch.conditional_velocity}
        if self.uses_teacher:
            choices[Velocity.model] = self.target_drift(fm, teacher, batch.x, batch.s, batch.label)
        return choices[self.tangent], choices[self.target]

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        return slim_residual(fm, batch, *self.velocities(fm, batch, teacher), terms)

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        """Return |r|^2 / sg[|r|^2 + c / dimensions]^p with |r|^2 averaged: for p = 1 the published weight of the sum.

        A loss near 1 in any dimension keeps the gradient of a large network far above Adam's epsilon.
        """
        as_large: Tensor = super().adapted(losses, draws, dimensions) * dimensions**self.adaptive
        return as_large


def slim_residual(
    fm: FlowMap, batch: OffDiagonalBatch, tangent: Tensor, target: Tensor, terms: dict[str, Tensor]
) -> Tensor:
    """Return v_{s,t} - target - (t - s) sg[d_s v + grad v . tangent]; the gradient flows through v_{s,t} alone."""
    v, dv = velocity_jvp(fm, batch.x, batch.s, batch.t, batch.label, dx=tangent, ds=1.0, constant=True)
    terms["jvp_norm"] = rms(dv)
    return v - target - expand(batch.t - batch.s, batch.x) * dv
