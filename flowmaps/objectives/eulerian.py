"""Eulerian self-distillation (ESD), and MeanFlow, which is its slim form with another velocity."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.derivatives import velocity_jvp
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Objective, Rows, rms
from samplers.callables import Drift, expand


class Stop(enum.Enum):
    """What is a constant in the Eulerian residual."""

    advection = "advection"  # the whole term grad X . v_{s,s}: the paper's recommendation
    velocity = "velocity"  # v_{s,s} alone: the gradient also flows through the spatial derivative
    slim = "slim"  # all but v_{s,t}: no derivative is differentiated


@dataclass(frozen=True)
class Eulerian(Objective):
    """r = d/ds X_{s,t}(I_s) + sg[ grad X_{s,t}(I_s) . v_{s,s}(I_s) ]: the end point stays as the start moves on.

    Boffi et al. 2025 (arXiv 2505.18825), algorithm 3; ``stop`` = slim is the stop-gradient regression of
    arXiv 2609.16222, r = v_{s,t} - sg[ v_{s,s} + (t - s) (d_s v + grad v . v_{s,s}) ].
    """

    stop: Stop = Stop.advection

    @property
    def taught(self) -> bool:
        return True

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        x, s, t, label = rows.x, rows.s, rows.t, rows.label
        with torch.no_grad():
            velocity = (teacher or fm.drift)(x, s, label)
        if self.stop is Stop.slim:
            return slim_residual(fm, rows, velocity, velocity, terms)
        if self.stop is Stop.velocity:
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

    conditional = "conditional"  # dI_s/ds of the row's own noise and data
    model = "model"  # v_{s,s}(I_s)


@dataclass(frozen=True)
class MeanFlow(Objective):
    """r = v_{s,t} - sg[ u + (t - s) (d_s v + grad v . w) ]; ``target`` u and ``tangent`` w are conditional velocities.

    Geng et al. 2025 (arXiv 2505.13447), the MeanFlow identity at this package's times and sign.
    """

    tangent: Velocity = Velocity.conditional
    target: Velocity = Velocity.conditional

    @property
    def taught(self) -> bool:
        return Velocity.model in (self.tangent, self.target)

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        choices = {Velocity.conditional: rows.velocity}
        if self.taught:
            with torch.no_grad():
                choices[Velocity.model] = (teacher or fm.drift)(rows.x, rows.s, rows.label)
        return slim_residual(fm, rows, choices[self.tangent], choices[self.target], terms)


@dataclass(frozen=True)
class ImprovedMeanFlow(MeanFlow):
    """MeanFlow along the model's own velocity: a regression of v - (t - s) sg[d_s v + grad v . v_{s,s}] on dI_s/ds.

    Geng et al. 2025 (arXiv 2512.02012).
    """

    tangent: Velocity = Velocity.model


def slim_residual(fm: FlowMap, rows: Rows, tangent: Tensor, target: Tensor, terms: dict[str, Tensor]) -> Tensor:
    """v_{s,t} - target - (t - s) sg[d_s v + grad v . tangent]; the gradient flows through v_{s,t} alone."""
    v, dv = velocity_jvp(fm, rows.x, rows.s, rows.t, rows.label, dx=tangent, ds=1.0)
    terms["jvp_norm"] = rms(dv)
    return v - target - expand(rows.t - rows.s, rows.x) * dv.detach()
