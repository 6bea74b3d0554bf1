"""Distributions of training times, computed from uniform numbers so that a step draws the same ones for each."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Objective, new_option


class Times(enum.Enum):
    """Distribution of the times (s, t) of a training row."""

    triangle = "triangle"  # uniform on s < t; s = t uniform: Boffi et al. 2025
    logit_normal = "logit_normal"  # two logit-normal times in order: MeanFlow
    gap = "gap"  # a logit-normal gap t - s, and a logit-normal end t that is not below it: TVM


class DiagonalDraw(enum.Enum):
    """The time of a diagonal row (s = t) when ``times`` is logit_normal."""

    smaller = "smaller"  # of a pair, as off the diagonal: MeanFlow, improved MeanFlow
    single = "single"  # one draw, of the first law: pixel MeanFlow, SoFlow


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Return times in [0, 1] whose logit log(t / (1 - t)) is normal, from uniform numbers of any shape.

    Papers with noise at time 1 give the mean with the other sign: their (-0.4, 1) is (0.4, 1) here.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def gap_first(uniform: Tensor, mean: tuple[float, float], std: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return (s, t) [n] from uniform numbers [2, n]: a logit-normal gap, then an end t that is not below it.

    Terminal Velocity Matching (arXiv 2511.19797): the gap g = sigmoid(m2 + d2 ndtri(u2)), the end t logit-normal with
    (m1, d1) and truncated to t >= g by its distribution function, s = t - g. ``mean`` and ``std`` are (m1, m2) and
    (d1, d2). Finite also for u = 0.
    """
    logit_gap = mean[1] + std[1] * torch.special.ndtri(uniform[1])
    above = torch.special.ndtr((mean[0] - logit_gap) / std[0])  # P(t > g)
    end = torch.sigmoid(mean[0] - std[0] * torch.special.ndtri(uniform[0] * above))
    gap = torch.sigmoid(logit_gap)
    end = torch.maximum(end, gap)  # by rounding, and where no end is left above a gap of 1
    return end - gap, end


@dataclass
class TimeSampling(Objective):
    """Options for the distribution of times, for objectives that leave it open."""

    times: Times = Times.triangle
    time_mean: tuple[float, float] = (0.4, 0.4)  # of the logits of logit_normal's two times, or of gap's end and gap
    time_std: tuple[float, float] = (1.0, 1.0)
    diagonal_draw: DiagonalDraw = new_option(DiagonalDraw.smaller, before=DiagonalDraw.single)  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.time_mean) != 2:
            raise UserError("must be two numbers", field="time_mean", value=self.time_mean)
        if len(self.time_std) != 2 or not all(std > 0 for std in self.time_std):
            raise UserError("must be two positive numbers", field="time_std", value=self.time_std)
        drawn, pair = self.times is not Times.triangle, self.times is Times.logit_normal
        for name, used in (("time_mean", drawn), ("time_std", drawn), ("diagonal_draw", pair)):
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                raise UserError(f"has no effect with times={self.times.name}: choose other times", name, value)

    def idle(self) -> set[str]:
        return super().idle() | (set() if self.times is Times.logit_normal else {"diagonal_draw"})

    def diagonal_times(self, uniform: Tensor) -> Tensor:
        if self.times is Times.triangle:
            return super().diagonal_times(uniform)
        if self.times is Times.logit_normal and self.diagonal_draw is DiagonalDraw.smaller:
            return self.pair(uniform)[0]
        return logit_normal(uniform[0], self.time_mean[0], self.time_std[0])

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        if self.times is Times.triangle:
            return super().off_diagonal_times(uniform, fm, step)
        return (
            self.pair(uniform)
            if self.times is Times.logit_normal
            else gap_first(uniform, self.time_mean, self.time_std)
        )

    def pair(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return two logit-normal times [n] in order from uniform numbers [2, n]."""
        a, b = (logit_normal(uniform[i], self.time_mean[i], self.time_std[i]) for i in (0, 1))
        return torch.minimum(a, b), torch.maximum(a, b)
