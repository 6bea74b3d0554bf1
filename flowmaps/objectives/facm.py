"""Flow-anchored consistency: the map to data, held by the drift of the same network."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmaps.derivatives import derivative_autocast, velocity_jvp
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.layers import no_dropout
from flowmaps.objectives.base import DerivativeRole, Draws, Segments, mean_square, rms
from flowmaps.objectives.self_distillation import DriftObjective
from samplers.callables import Drift, expand


@dataclass
class FACM(DriftObjective):
    r"""Every row trains the drift, $v_{s,s}$ towards u, and the map, $v_{s,1}$ towards $u + (1 - s) \mathrm{sg}[Dv]$.

    Flow-Anchored Consistency Models, Peng et al. 2025 (arXiv 2507.03738). u is the teacher's drift at $(I_s, s)$, or
    without a teacher $dI_s/ds$, guided if guidance is on; $Dv = \partial_s v + \nabla v \cdot u$. A row's loss is

    $$\begin{aligned}
    &|v_{s,s} - u|^2 + 1 - \cos(v_{s,s}, u) + \cos(\pi s / 2)\, |r|^2 / \mathrm{sg}[|r|^2 + c]^p, \\
    &r = v_{s,1} - \mathrm{sg}[v_{s,1} - (1 - \sqrt{s})\, \mathrm{clamp}(v_{s,1} - u - (1 - s) Dv, -1, 1)],
    \end{aligned}$$

    with squares averaged over dimensions, and the cosine over channels averaged over places (smaller for vectors
    shorter than 0.01, so that a network that starts at 0 has a gradient of some size). The noise level of s is
    log-normal: $s = 1 - (2 / \pi) \arctan \sigma$. The kind is "consistency", as only jumps to data are trained.
    """

    adaptive: float = 0.5  # power p of the map's adaptive weight; its c is ``adaptive_floor``
    sigma_mean: float = -0.8
    sigma_std: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_ema:
            raise UserError("an average of the network itself has nothing to teach: 0", "teacher_ema", self.teacher_ema)
        if not self.sigma_std > 0:
            raise UserError("must be positive", field="sigma_std", value=self.sigma_std)

    @property
    def kind(self) -> str:
        return "consistency"

    @property
    def uses_teacher(self) -> bool:
        return True

    @property
    def derivative_role(self) -> DerivativeRole:
        return DerivativeRole.constant

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(self.sigma_mean + self.sigma_std * torch.special.ndtri(uniform[0]))
        return 1 - torch.atan(sigma) * 2 / math.pi, torch.ones_like(sigma)

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        x, u, label = self.conditional(fm, x1, label, draws)
        if teacher is not None:
            if draws.guidance is not None:
                weight = max(self.guidance, self.guidance_max)
                raise UserError("the teacher's drift is taken as it is: leave it at 1", "guidance", weight)
            with torch.no_grad(), derivative_autocast(x):
                u = teacher(x, draws.s, label)
        drift = fm.drift(x, draws.s, label)
        anchor, turn = mean_square(drift - u), 1 - cosine(drift, u)
        with no_dropout(fm.network):
            v, dv = velocity_jvp(fm, x, draws.s, draws.t, label, dx=u, ds=1.0, constant=True)
        error = v.detach() - u - expand(draws.t - draws.s, x) * dv
        target = v.detach() - expand(1 - draws.s.sqrt(), x) * error.clamp(-1, 1)
        jump = mean_square(v - target)
        terms["diagonal"], terms["cosine"] = anchor.detach().mean(), 1 - turn.detach().mean()
        terms["off_diagonal"], terms["jvp_norm"] = jump.detach().mean(), rms(dv)
        terms["residuals"] = jump
        map_weight = torch.cos(draws.s * math.pi / 2) * (jump.detach() + self.adaptive_floor) ** -self.adaptive
        return anchor + turn + map_weight * jump

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        return losses  # the map's part has its weight


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of the angle over channels [B, C, ...], averaged over places: [B], in at least float32."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return F.cosine_similarity(a, b, dim=1, eps=0.01).reshape(len(a), -1).mean(dim=1)
