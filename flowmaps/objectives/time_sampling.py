"""Distributions of training times, computed from uniform numbers so that a step draws the same ones for each."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Objective


class Times(enum.Enum):
    """Distribution of the times (s, t) of a training row."""

    triangle = "triangle"  # uniform on s < t; s = t uniform: Boffi et al. 2025
    logit_normal = "logit_normal"  # two logit-normal times in order: MeanFlow
    gap = "gap"  # a logit-normal end t, and a gap t - s that is a logit-normal share of t


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Return times in [0, 1] whose logit log(t / (1 - t)) is normal, from uniform numbers of any shape.

    Papers with noise at time 1 give the mean with the other sign: their (-0.4, 1) is (0.4, 1) here.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


@dataclass
class TimeSampling(Objective):
    """Options for the distribution of times, for objectives that leave it open."""

    times: Times = Times.triangle
    time_mean: tuple[float, float] = (0.4, 0.4)  # of the logits of logit_normal's two times, or gap's end and share
    time_std: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.time_mean) != 2:
            raise UserError("must be two numbers", field="time_mean", value=self.time_mean)
        if len(self.time_std) != 2 or not all(std > 0 for std in self.time_std):
            raise UserError("must be two positive numbers", field="time_std", value=self.time_std)
        for name, default in (("time_mean", (0.4, 0.4)), ("time_std", (1.0, 1.0))):
            if self.times is Times.triangle and getattr(self, name) != default:
                raise UserError("has no effect with times=triangle: choose other times", name, getattr(self, name))

    def diagonal_times(self, uniform: Tensor) -> Tensor:
        """Return the times of diagonal rows from ``uniform`` [n], distributed as the first of the pair."""
        if self.times is Times.triangle:
            return super().diagonal_times(uniform)
        return logit_normal(uniform, self.time_mean[0], self.time_std[0])

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        if self.times is Times.triangle:
            return super().off_diagonal_times(uniform, fm, step)
        a, b = (logit_normal(uniform[i], self.time_mean[i], self.time_std[i]) for i in (0, 1))
        if self.times is Times.gap:
            return a - a * b, a
        return torch.minimum(a, b), torch.maximum(a, b)
