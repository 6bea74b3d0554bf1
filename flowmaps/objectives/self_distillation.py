"""Objectives that learn the drift on rows with s = t, and self-distillation, which adds rows with s < t."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowmaps.derivatives import derivative_autocast
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.conditioning import guidance_at, with_guidance, without_label
from flowmaps.networks.layers import no_dropout
from flowmaps.objectives.base import Draws, Objective, mean_square, new_option
from samplers.callables import Drift, expand


@dataclass
class DriftObjective(Objective):
    """Regression of $v_{t,t}(I_t)$ on $dI_t/dt$ (flow matching), optionally with guidance baked in."""

    adaptive: float = 0.0  # power p of the adaptive weight $1 / \mathrm{sg}[|r|^2 + c]^p$; 0: none
    adaptive_floor: float = new_option(1e-3, before=1e-3)  # the constant c of the adaptive weight
    teacher_ema: float = 0.0  # decay of the weight average whose drift is the teacher; 0: the live network's drift
    guidance: float = 1.0  # weight of baked-in guidance; 1: none
    guidance_max: float = 1.0  # above 1: draw each row's weight from [1, guidance_max] and condition the network on it
    guidance_power: float = new_option(1.0, before=0.0)  # p: drawn weights have a density proportional to $w^{-p}$
    guidance_mix: float = new_option(0.5, before=0.0)  # share of the network's own guided drift in the target: see
    # ``guided_target``; a drawn weight has the share $1 - 1/w$ in its place, unless this is 0
    guidance_times: tuple[float, float] = (0.0, 1.0)  # the weight is 1 for rows whose s lies outside
    guidance_interval: bool = new_option(False, before=False)  # with guidance_max: draw these times for each row with
    # s < t, low from [0, 1/2] and high from [1/2, 1], and condition the network on them and the weight between them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_ema < 1:
            raise UserError("a decay must lie in [0, 1)", field="teacher_ema", value=self.teacher_ema)
        if self.teacher_ema and not self.uses_teacher:
            raise UserError("this objective has no use for a teacher: leave it at 0", "teacher_ema", self.teacher_ema)
        if not (self.guidance == 1 <= self.guidance_max or self.guidance_max == 1 <= self.guidance):
            raise UserError(
                f"must be at least 1, and one of guidance and guidance_max={self.guidance_max} must be 1",
                field="guidance",
                value=self.guidance,
            )
        if not 0 <= self.guidance_mix < 1:
            raise UserError("a share must lie in [0, 1)", field="guidance_mix", value=self.guidance_mix)
        low, high = self.guidance_times
        if not 0 <= low < high <= 1:
            raise UserError("are two times in order from 0 to 1", field="guidance_times", value=self.guidance_times)
        if (low, high) != (0, 1) and not self.guided:
            raise UserError(
                "have no effect without guidance or guidance_max", field="guidance_times", value=self.guidance_times
            )
        if self.guidance_interval and (self.guidance_max == 1 or (low, high) != (0, 1)):
            raise UserError(
                "needs guidance_max above 1, and excludes guidance_times", "guidance_interval", self.guidance_interval
            )

    def idle(self) -> set[str]:
        mix = set() if self.guided else {"guidance_mix"}
        return super().idle() | mix | (set() if self.guidance_max > 1 else {"guidance_power"})

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        draws = super().draw(fm, x1, generator, step)
        if not self.guided:
            return draws
        uniform = torch.rand(len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
        guidance = torch.full_like(uniform, self.guidance) if self.guidance > 1 else self.guidance_weights(uniform)
        low, high = self.guidance_times
        if not self.guidance_interval:
            return draws._replace(guidance=torch.where((draws.s >= low) & (draws.s <= high), guidance, 1.0))
        interval = torch.rand(2, len(x1), generator=generator, device=x1.device, dtype=x1.dtype) / 2
        interval[:, : self.diagonal_rows(len(x1))] = 0  # there from 0 to 1
        told = torch.stack([guidance, interval[0], 1 - interval[1]], dim=1)
        return draws._replace(guidance=guidance_at(told, draws.s)[:, 0], told=told)

    def path_velocity(self, fm: FlowMap, x0: Tensor, x1: Tensor, s: Tensor) -> Tensor:
        """Return the velocity of the path from x0 to x1 [B, ...] at s [B]: dI_s/ds."""
        return fm.interpolant.conditional_velocity(x0, x1, s)

    def own_drift(self, fm: FlowMap) -> Drift:
        """Return the drift of ``fm`` that stands in targets."""
        return fm.drift

    def guidance_weights(self, uniform: Tensor) -> Tensor:
        """Return weights in [1, guidance_max] with density proportional to w^-guidance_power from uniform numbers."""
        power = 1 - self.guidance_power
        if abs(power) < 1e-6:
            return torch.exp(uniform * math.log(self.guidance_max))
        return torch.pow(1 + uniform * (self.guidance_max**power - 1), 1 / power)

    def conditional(
        self, fm: FlowMap, x1: Tensor, label: Tensor | None, draws: Draws, teacher: Drift | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return I_s and the target dI_s/ds [B, ...], guided if guidance is on, and the label that goes with them.

        With ``guidance_interval`` that label says the weight and the interval as drawn. The target has the weight that
        they give at s, and is mixed of drifts that are guided at all times (arXiv 2512.02012).
        """
        x_s = fm.interpolant.point(draws.x0, x1, draws.s)
        velocity = self.path_velocity(fm, draws.x0, x1, draws.s)
        if draws.guidance is not None:
            drift = teacher if teacher is not None and self.teacher_ema else self.own_drift(fm)
            given = label
            velocity, label = self.guided_target(fm, x_s, draws.s, given, velocity, draws.guidance, drift)
            if draws.told is not None and given is not None:
                label = with_guidance(given, draws.told, fm.info.label_size)
        return x_s, velocity, label

    def guided_target(
        self, fm: FlowMap, x: Tensor, s: Tensor, label: Tensor | None, velocity: Tensor, guidance: Tensor, drift: Drift
    ) -> tuple[Tensor, Tensor]:
        r"""Return the regression target under guidance weights w [B], and the label that goes with it.

        The target is $\omega\, dI_s/ds + \kappa c + (1 - \omega - \kappa) u$ with the constants c = b(I_s; label) and u
        = b(I_s; no label) of ``drift``, and $\omega = w (1 - \kappa)$. A drift c that equals its mean given $I_s$ is
        the guided one, w b + (1 - w) u, for every $\kappa$; the variance is $\omega^2$ times that of $dI_s/ds$. $\kappa
        = 0$ is the form of MeanFlow's appendix (arXiv 2505.13447) and the noisiest; its released models have 0.5 or
        0.92, and improved MeanFlow, which tells the network w, has 1 - 1 / w, so that $\omega = 1$ (arXiv 2512.02012).
        All objectives are guided in this way, since the off-diagonal terms follow the drift that the diagonal learns.
        Rows without a label have w = 1 and the target dI_s/ds.
        """
        if label is None:
            raise UserError("needs labels", field="guidance" if self.guidance > 1 else "guidance_max")
        unlabelled, has_label = without_label(label, fm.info.label_size)
        w = torch.where(has_label, guidance, 1.0)
        told = self.guidance_max > 1
        if told:
            label = with_guidance(label, w, fm.info.label_size)
        with torch.no_grad(), no_dropout(fm.network):
            u = drift(x, s, unlabelled).to(velocity.dtype)
            c = drift(x, s, label).to(velocity.dtype) if self.guidance_mix else u
        mix = 1 - 1 / w if told else torch.where(w > 1, self.guidance_mix, 0.0)
        kappa = expand(mix if self.guidance_mix else torch.zeros_like(w), velocity).to(velocity.dtype)
        omega = expand(w, velocity).to(velocity.dtype) * (1 - kappa)
        return omega * velocity + kappa * c + (1 - omega - kappa) * u, label

    def drift_losses(
        self, fm: FlowMap, x: Tensor, s: Tensor, label: Tensor | None, velocity: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """Return |v_{s,s}(x) - velocity|^2 of rows with s = t: [n]."""
        losses = mean_square(fm.drift(x, s, label) - velocity)
        terms["diagonal"] = losses.detach().mean()
        return losses


class OffDiagonalBatch(NamedTuple):
    """Rows with s < t: noise, data, the point x = I_s, its velocity dI_s/ds [n, ...], times, gamma [n] and labels."""

    x0: Tensor
    x1: Tensor
    x: Tensor
    conditional_velocity: Tensor
    s: Tensor
    t: Tensor
    gamma: Tensor | None
    label: Tensor | None


@dataclass
class SelfDistillation(DriftObjective):
    """Train a flow map without a teacher: L = L_diagonal + L_off-diagonal.

    The first ``floor(diagonal * B)`` rows of a batch have s = t and learn the drift by flow matching. The others have
    s < t and get the method's own ``residual``, without dropout. Rows with s = t never enter a derivative. Boffi et al.
    2025 (arXiv 2505.18825), algorithm 1, with the joint mean over all B rows of the authors' code; squared residuals
    are averaged over a sample's dimensions.
    """

    diagonal: float = 0.75  # share of rows with s = t
    off_diagonal_dropout = staticmethod(no_dropout)  # not an option: the dropout of ``residual``

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diagonal <= 1:
            raise UserError("a share must lie in [0, 1]", field="diagonal", value=self.diagonal)

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        rows = self.diagonal_rows(len(x1))
        x_s, velocity, label = self.conditional(fm, x1, label, draws, teacher)
        losses: list[Tensor] = []
        if rows:
            losses.append(
                self.drift_losses(fm, x_s[:rows], draws.s[:rows], part(label, 0, rows), velocity[:rows], terms)
            )
        if rows < len(x1):
            tensors = (draws.x0, x1, x_s, velocity, draws.s, draws.t)
            x0, x1, x_s, velocity, s, t = (a[rows:] for a in tensors)
            gamma, label = (part(a, rows, None) for a in (draws.gamma, label))
            batch = OffDiagonalBatch(x0, x1, x_s, velocity, s, t, gamma, label)
            with self.off_diagonal_dropout(fm.network):
                losses.append(self.jump_losses(fm, batch, teacher, terms))
        return torch.cat(losses, dim=-1)

    def jump_losses(
        self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]
    ) -> Tensor:
        """Return |residual|^2 of rows with s < t: [n]."""
        losses = mean_square(self.residual(fm, batch, teacher, terms))
        terms["off_diagonal"] = losses.detach().mean()
        return losses

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        """Return the off-diagonal residual [n, ...], with the method's stop-gradients; put what to log into ``terms``.

        ``teacher`` is a drift for the target, None for the live network's: see ``target_drift``.
        """
        raise NotImplementedError

    def target_drift(self, fm: FlowMap, teacher: Drift | None, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Return b_t(x) of the teacher, or of the live network, as a constant, in the precision of derivatives.

        The residual is the small difference of a derivative and this, so that a coarser drift would bias its gradient.
        With ``guidance_interval`` the drift is that of the weight which applies at t.
        """
        if self.guidance_interval and label is not None:
            label = guidance_at(label, t)
        with torch.no_grad(), derivative_autocast(x):
            return (teacher or self.own_drift(fm))(x, t, label)


def part(values: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    """Return rows ``start`` .. ``stop`` of optional labels or numbers."""
    return None if values is None else values[start:stop]
