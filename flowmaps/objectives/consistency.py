"""Consistency training: the map to data alone, X_{s,1}."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.layers import shared_dropout
from flowmaps.objectives.base import Dropout, Objective, Rows
from flowmaps.objectives.time_sampling import Times
from samplers.callables import Drift, expand


@dataclass(frozen=True)
class Consistency(Objective):
    """r = ( X_{s,1}(I_s) - sg[ X_{u,1}(I_u) ] ) / (sigma_s - sigma_u), both points with the same noise and data.

    Easy Consistency Tuning, Geng et al. 2024 (arXiv 2406.14548), in this package's times. The noise level is
    sigma = base_std alpha / beta, log-normal with ``sigma_mean`` and ``sigma_std``; the target's is lower,
    sigma_u = sigma_s (1 - n / q^(1 + stage)), at least 0, with n = 1 + k / (1 + exp(b sigma_s)). The stage rises by one
    every ``stage_steps`` steps (0: never), so that the gap and the bias with it shrink. ``adaptive`` = 1/2 makes the
    squared residual the norm that the paper has, over the dimension. Student and target share the dropout mask, and are
    evaluated in at least float32.

    With a teacher it is consistency distillation, Song et al. 2023 (arXiv 2303.01469): the target starts where a Heun
    step of the teacher's drift leads from I_s to u, instead of at I_u.

    Every row is of this kind: X_{s,1} is all that is trained, which is what kind "consistency" tells a sampler.
    """

    dropout: ClassVar[Dropout] = shared_dropout

    diagonal: float = field(default=0.0, init=False)
    teacher_ema: float = field(default=0.0, init=False)  # an average of a network that has no drift would teach nothing
    times: Times = field(default=Times.triangle, init=False)  # the noise level's distribution takes its place
    time_mean: tuple[float, float] = field(default=(0.4, 0.4), init=False)
    time_std: tuple[float, float] = field(default=(1.0, 1.0), init=False)
    guidance: float = field(default=1.0, init=False)  # there is no drift to guide
    guidance_max: float = field(default=1.0, init=False)
    guidance_times: tuple[float, float] = field(default=(0.0, 1.0), init=False)
    adaptive: float = 0.5
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
    def taught(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.q > 1 or not self.sigma_std > 0 or min(self.k, self.b, self.stage_steps) < 0:
            raise UserError(
                "objective.q must be above 1, sigma_std positive, k, b and stage_steps not negative, "
                f"got {self.q}, {self.sigma_std}, {self.k}, {self.b} and {self.stage_steps}"
            )

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        """(s, u): the student's time and the target's; u = 1 where the target is the data itself."""
        sigma = torch.exp(self.sigma_mean + self.sigma_std * torch.special.ndtri(uniform[0])).clamp(1e-6, 1e6)
        stage = step // self.stage_steps if self.stage_steps else 0
        n = 1 + self.k * torch.sigmoid(-self.b * sigma)
        ratio = (1 - n * self.q ** -(1 + stage)).clamp(min=0)
        time = fm.interpolant.time
        return time(sigma / fm.base_std), time(ratio * sigma / fm.base_std)

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        path, s, u, label = fm.interpolant, rows.s, rows.t, rows.label
        end = torch.ones_like(s)
        with torch.autocast(rows.x.device.type, enabled=False):  # student and target differ by little
            student = self.to_data(fm, rows.x, s, end, label)
            with torch.no_grad():
                x_u = path.point(rows.x0, rows.x1, u) if teacher is None else heun_step(teacher, rows.x, s, u, label)
                target = self.to_data(fm, x_u, u, end, label)
        sigma_s, sigma_u = (fm.base_std * path.alpha(time) / path.beta(time) for time in (s, u))
        return (student - target) / expand((sigma_s - sigma_u).clamp(min=1e-9), student)

    @staticmethod
    def to_data(fm: FlowMap, x: Tensor, s: Tensor, end: Tensor, label: Tensor | None) -> Tensor:
        """X_{s,1}(x)."""
        return x + expand(end - s, x) * fm.velocity(x, s, end, label)


def heun_step(drift: Drift, x: Tensor, s: Tensor, u: Tensor, label: Tensor | None) -> Tensor:
    """From x [B, ...] at times s [B] to times u [B] along ``drift``, with an error of order 3."""
    h, b = expand(u - s, x), drift(x, s, label)
    return x + h / 2 * (b + drift(x + h * b, u, label))
