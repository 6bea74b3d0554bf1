"""Lagrangian self-distillation (LSD)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.derivatives import d_dt
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Objective
from samplers.callables import Drift


@dataclass(frozen=True)
class Lagrangian(Objective):
    """r = d/dt X_{s,t}(I_s) - sg[ v_{t,t}( X_{s,t}(I_s) ) ]: the map moves with the drift at its own end point.

    Boffi et al. 2025 (arXiv 2505.18825), algorithm 2. The gradient flows through v_{s,t} and its t-derivative
    (reverse over forward); the velocity at the end point and the point itself are constants.
    """

    def residual(
        self, fm: FlowMap, x_s: Tensor, s: Tensor, t: Tensor, label: Tensor | None, teacher: Drift | None
    ) -> Tensor:
        x_t, dx_dt = d_dt(fm, x_s, s, t, label)
        with torch.no_grad():
            target = (teacher or fm.drift)(x_t.detach(), t, label)
        return dx_dt - target
