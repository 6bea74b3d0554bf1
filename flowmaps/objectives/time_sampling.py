"""Distributions of training times, from uniform numbers, so that a step's draws are the same for all of them."""

import enum

import torch
from torch import Tensor


class Times(enum.Enum):
    """How the times (s, t) of a training row are distributed."""

    triangle = "triangle"  # uniform on s < t; s = t uniform: Boffi et al. 2025
    logit_normal = "logit_normal"  # two logit-normal times in order: MeanFlow
    gap = "gap"  # a logit-normal end t, and a gap t - s that is a logit-normal share of t


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Times in [0, 1] whose logit log(t / (1 - t)) is normal, from uniform numbers of any shape.

    Papers with noise at time 1 give the mean with the other sign: their (-0.4, 1) is (0.4, 1) here.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def pair(kind: Times, uniform: Tensor, mean: tuple[float, float], std: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(s, t), s <= t, of off-diagonal rows from ``uniform`` [2, n]; ``mean`` and ``std`` of the two logits."""
    if kind is Times.triangle:
        return uniform.amin(dim=0), uniform.amax(dim=0)
    a, b = (logit_normal(uniform[i], mean[i], std[i]) for i in (0, 1))
    if kind is Times.gap:
        return a - a * b, a
    return torch.minimum(a, b), torch.maximum(a, b)


def single(kind: Times, uniform: Tensor, mean: float, std: float) -> Tensor:
    """The time of diagonal rows (s = t) from ``uniform`` [n]: that of the first of the pair."""
    return uniform if kind is Times.triangle else logit_normal(uniform, mean, std)
