"""Linear measurements y = A x + noise of samples, as rewards of ``samplers.steer``: inpainting and super-resolution."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from samplers.steer import Stage


@dataclass(frozen=True)
class Measurement:
    """The reward r(x) = -|y - A x|^2 / (2 std^2) with A A^T = ``gain`` times the identity.

    The potential adds the noise that the rest of the chain will put in, V = std^2 + gain sigma1^2 (1 - exponent^2);
    proposals are the kernel conditioned on y. For Gaussian data with their ``mean`` both are exact; on images leave
    the mean out (docs/steering.md).

    Args:
        forward: A, samples [B, ...] to measured values [B, ...].
        adjoint: A^T, back.
        gain: c; 1 for a choice of pixels, 1 / k^2 for means of k x k.
        y: The measured values, [B, ...] or [1, ...] for all samples; where A is 0 they count for nothing.
        std: The standard deviation of their noise.
        mean: The mean of the data as a number or [...], or None.

    Raises:
        ValueError: ``std`` or ``gain`` is not positive. When used: ``gamma`` = 0, which has no kernel to condition.
    """

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    gain: float
    y: Tensor
    std: float
    mean: Tensor | float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.std < math.inf and 0 < self.gain < math.inf):
            raise ValueError(f"a measurement needs positive std and gain, got {self.std} and {self.gain}")

    @cached_property
    def observed(self) -> Tensor:
        """The number of measured values that A does not make 0, [B] or [1]."""
        one = self.forward(self.adjoint(torch.ones_like(self.y))) / self.gain
        return one.flatten(1).double().sum(dim=1)

    def _residual(self, guess: Tensor, factor: float) -> Tensor:
        """Return y - A (mean + factor (guess - mean)); without a mean, y - A guess. Zero where A is."""
        return self._off(guess if self.mean is None else self.mean + factor * (guess - self.mean))

    def _off(self, x: Tensor) -> Tensor:
        seen = self.forward(x)
        if seen.shape[1:] != self.y.shape[1:] or self.y.shape[0] not in (1, len(seen)):
            raise ValueError(f"y is {list(self.y.shape)}, and the samples are measured as {list(seen.shape)}")
        return self.forward(self.adjoint(self.y - seen)) / self.gain

    def error(self, x: Tensor) -> Tensor:
        """Return the root mean square of y - A x over the measured values of each sample: [B]."""
        off = self._off(x).double().square().flatten(1).sum(dim=1)
        return (off / self.observed).sqrt()

    def _variance(self, stage: Stage) -> float:
        return self.std**2 + self.gain * stage.data_std**2 * (1 - stage.exponent**2)

    def potential(self, guess: Tensor, stage: Stage) -> Tensor:
        """Return -|y - A guess|^2 / (2 V) - (n / 2) log(V / std^2) for n measured values: [B]."""
        v = self._variance(stage)
        e = self._residual(guess, stage.exponent).double()
        return -e.square().flatten(1).sum(dim=1) / (2 * v) - self.observed / 2 * math.log(v / self.std**2)

    def propose(self, guess: Tensor, z: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Draw from the kernel conditioned on y, as if the look-ahead were linear with the slope of Gaussian data."""
        if not stage.width:
            raise ValueError("a measurement steers by noise: gamma must be above 0")
        factor = 1.0 if self.mean is None else stage.exponent
        slope, v, noise = factor / stage.lever, self._variance(stage), stage.width**2
        s = self.gain * (slope * stage.width) ** 2
        shrunk = math.sqrt(v / (s + v))
        pull = self.adjoint(self._residual(guess, factor * stage.rho)) * (slope * noise / (s + v))
        seen = self.adjoint(self.forward(z)) / self.gain
        moved = pull + stage.width * (z - (1 - shrunk) * seen)
        ratio = (z.double().square() - (moved.double() / stage.width).square()).flatten(1).sum(dim=1) / 2
        return moved, ratio + self.observed * math.log(shrunk)


def inpaint(image: Tensor, mask: Tensor, std: float = 0.05) -> Measurement:
    """Measure the pixels of ``image`` [B or 1, ...] where ``mask`` (the same shape, or one that expands to it) is 0.

    The mask is 1 where pixels are to be filled in, as in diffusers.
    """
    given = (1 - mask).expand_as(image)
    return Measurement(lambda x: x * given, lambda y: y * given, 1.0, image, std)


def downsample(image: Tensor, factor: int, std: float = 0.05) -> Measurement:
    """Measure means of ``factor`` x ``factor`` pixels, which ``image`` [B or 1, C, h, w] has."""

    def up(y: Tensor) -> Tensor:
        return F.interpolate(y, scale_factor=factor, mode="nearest") / factor**2

    return Measurement(lambda x: F.avg_pool2d(x, factor), up, 1 / factor**2, image, std)


__all__ = ["Measurement", "downsample", "inpaint"]
