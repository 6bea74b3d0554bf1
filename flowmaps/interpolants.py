"""Interpolants I_t = alpha(t) x0 + beta(t) x1 between noise x0 (t = 0) and data x1 (t = 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.callables import expand


class Interpolant:
    """A path from noise to data: alpha(0) = beta(1) = 1 and alpha(1) = beta(0) = 0.

    Boffi et al. 2025 (arXiv 2505.18825), section 2. The coefficients map times of any
    shape to the same shape.
    """

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which alpha(t) / beta(t) = ratio; 0 gives 1, infinity gives 0."""
        raise NotImplementedError

    def point(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return I_t = alpha(t) x0 + beta(t) x1; ``x0``, ``x1`` [B, ...], ``t`` [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.beta(t), x1) * x1

    def conditional_velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        r"""$dI_t/dt = \alpha'(t) x_0 + \beta'(t) x_1$, whose mean given $I_t = x$ is the drift $b_t(x)$."""
        return expand(self.d_alpha(t), x0) * x0 + expand(self.d_beta(t), x1) * x1


@dataclass(frozen=True)
class Linear(Interpolant):
    """I_t = (1 - t) x0 + t x1: the straight path, used in all experiments of the flow-map paper."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def beta(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + ratio)


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    """I_t = cos(pi t / 2) x0 + sin(pi t / 2) x1: keeps the variance when noise and data have the same."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def d_beta(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def time(self, ratio: Tensor) -> Tensor:
        return 1 - torch.atan(ratio) * 2 / math.pi


INTERPOLANTS: dict[str, Interpolant] = {"linear": Linear(), "trigonometric": Trigonometric()}
