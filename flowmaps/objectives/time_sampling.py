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
    raised = "raised"  # a logit-normal start s, and a logit-normal end t, raised to just above s if it is below: SoFlow


PAIRS = (Times.logit_normal, Times.raised)


class DiagonalDraw(enum.Enum):
    """The time of a diagonal row (s = t) when ``times`` is logit_normal or raised."""

    smaller = "smaller"  # of a pair, as off the diagonal: MeanFlow, improved MeanFlow
    single = "single"  # one draw, of the first law: pixel MeanFlow
    own = "own"  # one draw, of a third law: SoFlow


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Return times in [0, 1] whose logit log(t / (1 - t)) is normal, from uniform numbers of any shape.

    Papers with noise at time 1 give the mean with the other sign: their (-0.4, 1) is (0.4, 1) here.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


LEAST_GAP = 1e-4  # of a raised end


def raised_end(uniform: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return (s, t) [n] from uniform numbers [2, n]: a logit-normal start, and a logit-normal end of at least s + 1e-4.

    SoFlow (arXiv 2512.15657). ``mean`` and ``std`` are those of the start's and the end's logits.
    """
    s, t = (logit_normal(uniform[i], mean[i], std[i]) for i in (0, 1))
    s = s.clamp(max=1 - LEAST_GAP)
    return s, torch.maximum(t, s + LEAST_GAP).clamp(max=1)


def gap_first(uniform: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
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
    time_mean: tuple[float, ...] = (0.4, 0.4)  # of the logits of the two times, or of gap's end and gap; a third
    # number: of the diagonal's time with diagonal_draw=own
    time_std: tuple[float, ...] = (1.0, 1.0)
    uniform_share: float = new_option(0.0, before=0.0)  # of rows whose times are uniform, with times=logit_normal
    diagonal_draw: DiagonalDraw = new_option(DiagonalDraw.smaller, before=DiagonalDraw.single)  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        drawn, pair = self.times is not Times.triangle, self.times in PAIRS
        count, words = (3, "three") if pair and self.diagonal_draw is DiagonalDraw.own else (2, "two")
        if drawn and len(self.time_mean) != count:
            raise UserError(f"must be {words} numbers", field="time_mean", value=self.time_mean)
        if drawn and (len(self.time_std) != count or not all(std > 0 for std in self.time_std)):
            raise UserError(f"must be {words} positive numbers", field="time_std", value=self.time_std)
        if not 0 <= self.uniform_share < 1:
            raise UserError("a share must lie in [0, 1)", field="uniform_share", value=self.uniform_share)
        uniform = ("uniform_share", self.times is Times.logit_normal)
        for name, used in (("time_mean", drawn), ("time_std", drawn), ("diagonal_draw", pair), uniform):
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                raise UserError(f"has no effect with times={self.times.name}: choose other times", name, value)

    def idle(self) -> set[str]:
        idle = set() if self.times in PAIRS else {"diagonal_draw"}
        return super().idle() | idle | (set() if self.times is Times.logit_normal else {"uniform_share"})

    def diagonal_times(self, uniform: Tensor) -> Tensor:
        if self.times is Times.triangle:
            return super().diagonal_times(uniform)
        draw = DiagonalDraw.single if self.times is Times.gap else self.diagonal_draw
        if draw is DiagonalDraw.smaller:
            return self.pair(uniform)[0]
        if draw is DiagonalDraw.single and self.times is Times.logit_normal:
            return self.unordered(uniform)[0]
        law = 2 if draw is DiagonalDraw.own else 0
        return logit_normal(uniform[0], self.time_mean[law], self.time_std[law])

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        if self.times is Times.triangle:
            return super().off_diagonal_times(uniform, fm, step)
        return self.pair(uniform)

    def pair(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return times s <= t [n] of the law ``times``, other than triangle, from uniform numbers [2, n]."""
        if self.times is Times.gap:
            return gap_first(uniform, self.time_mean, self.time_std)
        if self.times is Times.raised:
            return raised_end(uniform, self.time_mean, self.time_std)
        a, b = self.unordered(uniform)
        return torch.minimum(a, b), torch.maximum(a, b)

    def unordered(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return two times [n] from uniform numbers [2, n]: logit-normal, in ``uniform_share`` of the rows uniform."""
        share, (first, second) = self.uniform_share, uniform
        chosen = first < share
        if share:  # given the choice, this is uniform again
            first = torch.where(chosen, first / share, (first - share) / (1 - share))
        drawn = (logit_normal(u, self.time_mean[i], self.time_std[i]) for i, u in enumerate((first, second)))
        a, b = (torch.where(chosen, u, time) for u, time in zip((first, second), drawn, strict=True))
        return a, b
