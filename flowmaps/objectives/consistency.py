"""Consistency training: the map to data alone, X_{s,1}."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.layers import shared_dropout
from flowmaps.objectives.base import Draws, Objective, mean_square
from samplers.callables import Drift, expand


@dataclass
class Consistency(Objective):
    r"""$r = (X_{s,1}(I_s) - \mathrm{sg}[X_{u,1}(I_u)]) / (\sigma_s - \sigma_u)$, both with the same noise and data.

    Easy Consistency Tuning, Geng et al. 2024 (arXiv 2406.14548), in this package's times. The noise level is $\sigma =
    \sigma_0 \alpha / \beta$, $\sigma_0$ = ``base_std``, log-normal with ``sigma_mean`` and ``sigma_std``; the target's
    is lower, $\sigma_u = \sigma_s (1 - n / q^{1 + \mathrm{stage}})$, at least 0, with $n = 1 + k / (1 + e^{b
    \sigma_s})$. The stage rises by one every ``stage_steps`` steps (0: never), so that the gap and the bias with it
    shrink. ``adaptive`` = 1/2 makes the squared residual the norm that the paper has, over the dimension. ``huber`` = c
    gives the residual one more dimension, the constant $c / (\sigma_s - \sigma_u)$; the norm is then $\sqrt{|d|^2 +
    c^2} / (\sigma_s - \sigma_u)$ of the difference d in the numerator, the pseudo-Huber loss up to a constant. Student
    and target share the dropout mask, and are evaluated in at least float32.

    With a teacher it is consistency distillation, Song et al. 2023 (arXiv 2303.01469): the target starts where a Heun
    step of the teacher's drift leads from $I_s$ to u, instead of at $I_u$.

    Every row is of this kind. Only $X_{s,1}$ is trained, so there is nothing to guide and an average of the weights has
    nothing to teach. The kind "consistency" makes samplers that need other times refuse the model.
    """

    adaptive: float = 0.5  # power p of the adaptive weight $1 / \mathrm{sg}[|r|^2 + 0.001]^p$; 0: none
    huber: float = 0.0  # c; the paper has 0.06 on ImageNet; 0: none
    sigma_mean: float = -1.1
    sigma_std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stage_steps: int = 50_000

    @property
    def kind(self) -> str:
        return "consistency"

    @property
    def adaptive_floor(self) -> float:
        return 1e-30 if self.huber else 1e-3

    @property
    def uses_teacher(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.q > 1:
            raise UserError("must be above 1", field="q", value=self.q)
        if not self.sigma_std > 0:
            raise UserError("must be positive", field="sigma_std", value=self.sigma_std)
        if self.huber and self.adaptive != 0.5:
            raise UserError("needs adaptive=0.5", field="huber", value=self.huber)
        for name in ("k", "b", "stage_steps", "huber"):
            if getattr(self, name) < 0:
                raise UserError("must not be negative", field=name, value=getattr(self, name))

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        """Return (s, u), the times of student and target; u = 1 where the target is the data itself."""
        sigma = torch.exp(self.sigma_mean + self.sigma_std * torch.special.ndtri(uniform[0])).clamp(1e-6, 1e6)
        stage = step // self.stage_steps if self.stage_steps else 0
        n = 1 + self.k * torch.sigmoid(-self.b * sigma)
        ratio = (1 - n * self.q ** -(1 + stage)).clamp(min=0)
        time = fm.interpolant.time
        return time(sigma / fm.base_std), time(ratio * sigma / fm.base_std)

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        with shared_dropout(fm.network):
            losses = mean_square(self.residual(fm, x1, label, draws, teacher))
        terms["off_diagonal"] = losses.detach().mean()
        if self.huber:
            terms["residuals"] = losses
            losses = losses + (self.huber / self.level_gap(fm, draws)).square() / x1[0].numel()
        return losses

    def residual(self, fm: FlowMap, x1: Tensor, label: Tensor | None, draws: Draws, teacher: Drift | None) -> Tensor:
        """Return the residual [B, ...], with stop-gradient."""
        path, s, u = fm.interpolant, draws.s, draws.t
        x_s, end = path.point(draws.x0, x1, s), torch.ones_like(s)
        with torch.autocast(x1.device.type, enabled=False):  # student and target differ by little
            student = self.to_data(fm, x_s, s, end, label)
            with torch.no_grad():
                x_u = path.point(draws.x0, x1, u) if teacher is None else heun_step(teacher, x_s, s, u, label)
                target = self.to_data(fm, x_u, u, end, label)
        return (student - target) / expand(self.level_gap(fm, draws), student)

    @staticmethod
    def level_gap(fm: FlowMap, draws: Draws) -> Tensor:
        """Return sigma_s - sigma_u [B], at least 1e-9."""
        path = fm.interpolant
        sigma_s, sigma_u = (fm.base_std * path.alpha(time) / path.beta(time) for time in (draws.s, draws.t))
        return (sigma_s - sigma_u).clamp(min=1e-9)

    @staticmethod
    def to_data(fm: FlowMap, x: Tensor, s: Tensor, end: Tensor, label: Tensor | None) -> Tensor:
        """Return X_{s,1}(x)."""
        return x + expand(end - s, x) * fm.velocity(x, s, end, label)


def heun_step(drift: Drift, x: Tensor, s: Tensor, u: Tensor, label: Tensor | None) -> Tensor:
    """Take one Heun step along ``drift`` from x [B, ...] at times s [B] to times u [B], with an error of order 3."""
    h, b = expand(u - s, x), drift(x, s, label)
    return x + h / 2 * (b + drift(x + h * b, u, label))
