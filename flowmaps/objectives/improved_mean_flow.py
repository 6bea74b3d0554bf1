"""Improved MeanFlow: MeanFlow along the drift of the network itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmaps.derivatives import pair_jvp
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Draws, mean_square, new_option, rms
from flowmaps.objectives.eulerian import MeanFlow, Velocity
from flowmaps.objectives.perceptual import PerceptualTerms
from flowmaps.objectives.self_distillation import OffDiagonalBatch
from samplers.callables import Drift, expand


@dataclass
class ImprovedMeanFlow(PerceptualTerms, MeanFlow):
    r"""MeanFlow along the model's own velocity.

    A regression of $V = v - (t - s)\, \mathrm{sg}[\partial_s v + \nabla v \cdot q]$ on $dI_s/ds$: Geng et al. 2025
    (arXiv 2512.02012). q is $v_{s,s}$, or of a network with a second head (``IMFDiT``) that head at s = t. A row then
    has two losses, $|V - u|^2$ and $|\mathrm{second} - u|^2$ with the head at the row's own times, each with its
    adaptive weight. Guidance mixes u of q in either case.
    """

    adaptive_floor: float = new_option(0.01, before=1e-3)
    tangent: Velocity = Velocity.model
    end_floor: float = new_option(0.0, before=0.0)  # c > 0: $(x_1 - I_s) / \max(1 - s, c)$ for $dI_s/ds$, which is
    # the same up to s = 1 - c on the linear path. Pixel MeanFlow (arXiv 2601.22158): 0.05, as its network divides

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.end_floor < 1:
            raise UserError("must be in [0, 1)", field="end_floor", value=self.end_floor)

    def path_velocity(self, fm: FlowMap, x0: Tensor, x1: Tensor, s: Tensor) -> Tensor:
        velocity = super().path_velocity(fm, x0, x1, s)
        if not self.end_floor:
            return velocity
        if fm.interpolant_name != "linear":
            raise UserError("is for the linear path only", field="end_floor", value=self.end_floor)
        return velocity * expand(((1 - s) / self.end_floor).clamp(max=1), velocity)

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
        parts = [terms.pop(name) for name in ("v_diagonal", "v_off_diagonal") if name in terms]
        if not self.perceptual:
            return losses
        if not parts:
            name = next(iter(self.perceptual))
            raise UserError("needs a network with a second head", field=name, value=getattr(self, name))
        return torch.cat([losses, self.perceptual_losses(fm, x1, draws, torch.cat(parts), terms)])

    def own_drift(self, fm: FlowMap) -> Drift:
        network: Any = fm.network
        if not has_second_head(fm):
            return super().own_drift(fm)

        def second(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            drift: Tensor = network.second(x, t, t, label)
            return drift

        return second

    def drift_losses(
        self, fm: FlowMap, x: Tensor, s: Tensor, label: Tensor | None, velocity: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        if not has_second_head(fm):
            return super().drift_losses(fm, x, s, label, velocity, terms)
        network: Any = fm.network
        v, second = network.pair(x, s, s, label)
        losses = torch.stack([mean_square(y - velocity) for y in (v, second)])
        terms["v_diagonal"] = v  # for the perceptual terms
        terms["diagonal"], terms["second_diagonal"] = losses.detach().mean(dim=1)
        return losses

    def jump_losses(
        self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]
    ) -> Tensor:
        if not has_second_head(fm):
            return super().jump_losses(fm, batch, teacher, terms)
        tangent, target = self.velocities(fm, batch, teacher)
        v, second, dv = pair_jvp(fm.network, batch.x, batch.s, batch.t, batch.label, tangent)
        compound = v - expand(batch.t - batch.s, batch.x) * dv
        losses = torch.stack([mean_square(y - target) for y in (compound, second)])
        terms["off_diagonal"], terms["second_off_diagonal"] = losses.detach().mean(dim=1)
        terms["v_off_diagonal"], terms["jvp_norm"] = v, rms(dv)
        return losses


def has_second_head(fm: FlowMap) -> bool:
    """Return whether the network gives two velocities."""
    return bool(getattr(fm.network, "config", {}).get("second_head"))
