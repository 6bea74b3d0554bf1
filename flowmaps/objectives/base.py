"""What all objectives share: random draws, the diagonal term, the weight and the reduction."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.conditioning import with_guidance, without_label
from flowmaps.networks.layers import no_dropout
from flowmaps.objectives.time_sampling import Times, pair, single
from samplers.callables import Drift, expand
from samplers.schedule import Schedule
from samplers.trajectories import Trajectory

Dropout = Callable[[nn.Module], AbstractContextManager[None]]  # a rule for the dropout of a network inside a block


class Loss(NamedTuple):
    """``value``: the scalar to minimise; ``terms``: unweighted mean squared residuals, detached, for the log."""

    value: Tensor
    terms: dict[str, Tensor]


class Draws(NamedTuple):
    """The random part of one step: noise x0 [B, ...] and times s <= t [B], diagonal rows (s = t) first.

    ``fraction`` [B], uniform on [0, 1], is for methods that need one more number a row; ``guidance`` [B] are the
    weights of a guidance that is baked in, None without.
    """

    x0: Tensor
    s: Tensor
    t: Tensor
    fraction: Tensor
    guidance: Tensor | None = None


class Rows(NamedTuple):
    """Off-diagonal rows: noise, data, the point x = I_s of the path between, its velocity dI_s/ds, times and labels."""

    x0: Tensor
    x1: Tensor
    x: Tensor
    velocity: Tensor
    s: Tensor
    t: Tensor
    fraction: Tensor
    label: Tensor | None


@dataclass(frozen=True)
class Objective:
    """A loss for training a flow map by self-distillation: L = L_diagonal + L_off-diagonal.

    The first ``floor(diagonal * B)`` rows of a batch have s = t and regress v_{t,t}(I_t) on dI_t/dt (flow matching);
    the others have (s, t) uniform on the triangle s < t and get the method's own residual, without dropout. Rows with
    s = t never enter a derivative. Boffi et al. 2025 (arXiv 2505.18825), algorithm 1, with the joint mean over all B
    rows of the authors' code; squared residuals are averaged over a sample's dimensions.
    """

    dropout: ClassVar[Dropout] = no_dropout  # what the off-diagonal term does about dropout

    diagonal: float = 0.75  # share of rows with s = t
    adaptive: float = 0.0  # power p of the adaptive weight 1 / sg[|r|^2 + 1e-3]^p; 0: none
    teacher_ema: float = 0.0  # decay of the weights' average whose drift teaches; 0: the live network teaches itself
    guidance: float = 1.0  # weight of the guidance that is baked in; 1: none
    guidance_max: float = 1.0  # above 1: each row's weight is drawn from [1, guidance_max] and told to the network
    guidance_times: tuple[float, float] = (0.0, 1.0)  # the weight is 1 for rows whose s lies outside
    times: Times = Times.triangle
    time_mean: tuple[float, float] = (0.4, 0.4)  # of the logits of logit_normal's two times, or gap's end and share
    time_std: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.diagonal <= 1:
            raise UserError(f"objective.diagonal is a share and must lie in [0, 1], got {self.diagonal}")
        if not 0 <= self.adaptive <= 2:
            raise UserError(f"objective.adaptive is a power and must lie in [0, 2], got {self.adaptive}")
        if not 0 <= self.teacher_ema < 1:
            raise UserError(f"objective.teacher_ema is a decay and must lie in [0, 1), got {self.teacher_ema}")
        if self.teacher_ema and not self.taught:
            raise UserError("objective.teacher_ema: this objective has no use for a teacher, leave it at 0")
        if not (self.guidance == 1 <= self.guidance_max or self.guidance_max == 1 <= self.guidance):
            raise UserError(
                "objective.guidance and guidance_max must be at least 1, and one of them 1, "
                f"got {self.guidance} and {self.guidance_max}"
            )
        low, high = self.guidance_times
        if not 0 <= low < high <= 1 or ((low, high) != (0, 1) and not self.guided):
            raise UserError(
                "objective.guidance_times are two times from 0 to 1, and mean nothing without objective.guidance or "
                f"guidance_max, got {self.guidance_times}"
            )
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
                raise UserError(f"objective.{f.name} must be finite, got {value}")
        if len(self.time_mean) != 2 or len(self.time_std) != 2 or not all(std > 0 for std in self.time_std):
            raise UserError("objective.time_mean and time_std are two numbers each, the latter positive")
        if self.times is Times.triangle and (self.time_mean, self.time_std) != ((0.4, 0.4), (1.0, 1.0)):
            raise UserError("objective.time_mean and time_std mean nothing with times=triangle: choose other times")

    def __call__(
        self,
        fm: FlowMap,
        batch: Tensor | Trajectory,
        label: Tensor | None = None,
        *,
        generator: torch.Generator,
        teacher: Drift | None = None,
        weight: nn.Module | None = None,
        step: int = 0,
    ) -> Loss:
        """The loss on data ``batch`` [B, ...] with ``label`` [B] or None; all randomness is from ``generator``.

        A ``PathObjective`` takes a ``Trajectory`` for its batch, which has the label.

        ``teacher``: the drift that the off-diagonal term distils, None for the live network itself.
        ``weight``: a module w(s, t) -> [B], None for an unweighted loss. Dropout follows the network's mode.
        ``step``: steps done so far, for a method whose times change over training.
        """
        x1, label, draws = self.prepare(fm, batch, label, generator, step)
        return self.loss(fm, x1, label, draws, teacher=teacher, weight=weight)

    @property
    def kind(self) -> str:
        """What ``FlowMapInfo.kind`` says of the trained network."""
        return "map"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Step sizes that the network is trained for, by sampler."""
        return {}

    @property
    def taught(self) -> bool:
        """Whether the off-diagonal term asks a drift for its target: only then can a teacher take its place."""
        return False

    def diagonal_rows(self, batch_size: int) -> int:
        """How many rows of a batch have s = t."""
        return math.floor(self.diagonal * batch_size + 1e-9)  # 0.29 * 100 is 28.999...

    @property
    def guided(self) -> bool:
        """Whether guidance is baked in."""
        return max(self.guidance, self.guidance_max) > 1

    def prepare(
        self,
        fm: FlowMap,
        batch: Tensor | Trajectory,
        label: Tensor | None,
        generator: torch.Generator,
        step: int = 0,
    ) -> tuple[Tensor, Tensor | None, Draws]:
        """What ``loss`` takes: data x1 [B, ...], their label, and the random part."""
        if isinstance(batch, Trajectory):
            raise UserError("this objective learns from data [B, ...], not from a Trajectory")
        return batch, label, self.draw(fm, batch, generator, step)

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        """Noise and times for one batch; apart from the loss, so that the loss can be compiled."""
        options: dict[str, Any] = {"generator": generator, "device": x1.device, "dtype": x1.dtype}
        x0 = fm.base_std * torch.randn(x1.shape, **options)
        uniform = torch.rand(2, len(x1), **options)
        rows = self.diagonal_rows(len(x1))
        u = single(self.times, uniform[0, :rows], self.time_mean[0], self.time_std[0])
        s, t = self.off_diagonal_times(uniform[:, rows:], fm, step)
        fraction, guidance = torch.rand(len(x1), **options), None
        if self.guided:
            drawn = 1 + (self.guidance_max - 1) * torch.rand(len(x1), **options)
            guidance = torch.full_like(drawn, self.guidance) if self.guidance > 1 else drawn
            low, high = self.guidance_times
            start = torch.cat([u, s])
            guidance = torch.where((start >= low) & (start <= high), guidance, 1.0)
        return Draws(x0, torch.cat([u, s]), torch.cat([u, t]), fraction, guidance)

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        """(s, t) of the off-diagonal rows of training step ``step`` from uniform numbers [2, n]."""
        return pair(self.times, uniform, self.time_mean, self.time_std)

    def loss(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None = None,
        weight: nn.Module | None = None,
    ) -> Loss:
        """The loss at given draws: no randomness but dropout."""
        per_sample, terms = self.per_sample(fm, x1, label, draws, teacher, weight)
        return Loss(per_sample.mean(), terms)

    def per_sample(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        weight: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of each row [B], diagonal rows first, and the terms of ``Loss``."""
        rows = self.diagonal_rows(len(x1))
        x0, s, t, fraction, guidance = draws
        x_s = fm.interpolant.point(x0, x1, s)
        velocity = fm.interpolant.velocity(x0, x1, s)
        if guidance is not None:
            velocity, label = self.guide(fm, x_s, s, label, velocity, guidance)
        squared: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        if rows:
            residual = fm.drift(x_s[:rows], s[:rows], part(label, 0, rows)) - velocity[:rows]
            squared.append(mean_square(residual))
            terms["diagonal"] = squared[-1].detach().mean()
        if rows < len(x1):
            x0, x1, x_s, velocity, fraction = (a[rows:] for a in (x0, x1, x_s, velocity, fraction))
            off = Rows(x0, x1, x_s, velocity, s[rows:], t[rows:], fraction, part(label, rows, None))
            with type(self).dropout(fm.network):
                residual = self.residual(fm, off, teacher, terms)
            squared.append(self.error(residual, off))
            terms["off_diagonal"] = squared[-1].detach().mean()
        per_sample = torch.cat(squared)
        if self.adaptive:  # Geng et al. 2025 (arXiv 2505.13447), with |r|^2 the sum over a sample's dimensions
            total = per_sample.detach() * x1[0].numel()
            per_sample = per_sample * (total + 1e-3).pow(-self.adaptive)
        if weight is not None:  # exp(-w) |r|^2 + w: w learns the log of the residual's variance
            w = weight(s, t)
            per_sample = torch.exp(-w) * per_sample + w
            terms["weight_min"], terms["weight_max"] = w.detach().amin(), w.detach().amax()
        return per_sample, terms

    def guide(
        self, fm: FlowMap, x: Tensor, s: Tensor, label: Tensor | None, velocity: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity that is regressed under guidance w, and the label that goes with it.

        u + w (dI_s/ds - u) with u = sg[v_{s,s}(I_s; no label)], whose mean given I_s is the guided drift
        w b(x; label) + (1 - w) b(x; no label): MeanFlow's way (arXiv 2505.13447, appendix), for any objective, since
        the off-diagonal terms follow the drift that the diagonal learns. Rows without a label have w = 1.
        """
        if label is None:
            raise UserError("objective.guidance needs labels")
        unlabelled, has_label = without_label(label, fm.info.num_classes)
        w = torch.where(has_label, guidance, 1.0)
        with torch.no_grad(), no_dropout(fm.network):
            u = fm.drift(x, s, unlabelled)
        if self.guidance_max > 1:
            label = with_guidance(label, w, fm.info.num_classes)
        return torch.lerp(u.to(velocity.dtype), velocity, expand(w, velocity).to(velocity.dtype)), label

    def residual(self, fm: FlowMap, rows: Rows, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        """The off-diagonal residual [n, ...], with the method's stop-gradients; ``terms`` takes what to log."""
        raise NotImplementedError

    def error(self, residual: Tensor, rows: Rows) -> Tensor:
        """What is minimised of the off-diagonal residual [n, ...] of ``rows``: [n]."""
        return mean_square(residual)


def rms(value: Tensor) -> Tensor:
    """Root mean square of a detached tensor, for the log."""
    return mean_square(value.detach()).mean().sqrt()


def part(label: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    """Rows ``start`` .. ``stop`` of an optional label."""
    return None if label is None else label[start:stop]


def mean_square(residual: Tensor) -> Tensor:
    """Mean over a sample's dimensions of the squared residual, in at least float32: [B, ...] -> [B]."""
    r = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return r.square().flatten(1).mean(dim=1)
