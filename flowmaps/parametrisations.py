"""Parametrisations of published one-time models, which make each of them a drift in this package's convention.

A model F was trained to predict a velocity, the noise or a denoised image, from inputs on its own scale and a noise
level on its own scale. All of these give the drift by one affine formula (noise at time 0, data at time 1, linear path
I_t = (1 - t) x0 + t x1 with x0 of standard deviation ``base_std``):

    b_t(x) = c_skip x + c_out F(c_in x, c_noise)

The coefficients are named as in Karras et al. 2022 (arXiv 2206.00364), table 1. x at time t is t (x1 + sigma e), with
noise level sigma = base_std (1 - t) / t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.callables import expand


class Reading(NamedTuple):
    """The coefficients of b_t(x) = c_skip x + c_out F(c_in x, c_noise) at times t, each [B]."""

    c_in: Tensor
    c_noise: Tensor
    c_skip: Tensor
    c_out: Tensor


@dataclass(frozen=True)
class Parametrisation:
    """A parametrisation of models; ``noise`` is the range of noise levels they were trained on."""

    read: Callable[[Tensor, float, float], Reading]  # of t [B], base_std, data_std
    noise: tuple[float, float] = (0.0, math.inf)

    def t_range(self, base_std: float) -> tuple[float, float]:
        """Return the times of these noise levels; outside, the drift is that of the nearest time inside."""
        low, high = self.noise
        return base_std / (base_std + high), base_std / (base_std + low)

    def __call__(self, t: Tensor, base_std: float, data_std: float = 1.0) -> Reading:
        """Return the coefficients at times ``t`` [B] in [0, 1]; finite if ``noise`` excludes 0 and infinity."""
        return self.read(t.clamp(*self.t_range(base_std)), base_std, data_std)


def velocity(t: Tensor, base_std: float, data_std: float) -> Reading:
    """F is the drift, with this package's time: SiT (Ma et al. 2024, arXiv 2401.08740)."""
    one = torch.ones_like(t)
    return Reading(one, t, torch.zeros_like(t), one)


def rectified_flow(t: Tensor, base_std: float, data_std: float) -> Reading:
    """As ``velocity``, with c_noise = 999 max(t, 1e-3), as in the training of Liu et al. 2023 (arXiv 2209.03003).

    Their Euler sampler gives the network 999 (1e-3 + (1 - 1e-3) t) at the same points.
    """
    return velocity(t, base_std, data_std)._replace(c_noise=999 * t.clamp(min=1e-3))


def denoiser(t: Tensor, base_std: float, data_std: float) -> Reading:
    """F(y, sigma) = E[x1 | x1 + sigma e = y]: b = (F(x / t, sigma) - x) / (1 - t)."""
    return Reading(1 / t, base_std * (1 - t) / t, -1 / (1 - t), 1 / (1 - t))


def edm(t: Tensor, base_std: float, data_std: float) -> Reading:
    """F is the raw network of EDM's preconditioned denoiser (Karras et al. 2022, arXiv 2206.00364, table 1).

    ``denoiser`` of c_skip y + c_out F(c_in y, ln(sigma) / 4), with t and 1 - t cancelled by hand: the only
    divisor left is the variance of I_t, so that no digits are lost at either end.
    """
    variance = ((1 - t) * base_std) ** 2 + (t * data_std) ** 2
    c_in = variance.rsqrt()
    c_skip = (t * data_std**2 - (1 - t) * base_std**2) / variance
    return Reading(c_in, (base_std * (1 - t) / t).log() / 4, c_skip, base_std * data_std * c_in)


def _ddpm_levels() -> Tensor:
    """Return ln sigma at the 1,000 times of DDPM's linear variances 1e-4 .. 0.02 (Ho et al. 2020, arXiv 2006.11239)."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0)
    return ((1 - kept) / kept).log() / 2


DDPM_LEVELS = _ddpm_levels()


def ddpm(t: Tensor, base_std: float, data_std: float) -> Reading:
    """F(z, k) is the noise in z = (x1 + sigma e) / sqrt(1 + sigma^2), at DDPM's discrete times k: DiT, DDPM.

    b = (x - base_std F) / t. Between two times, k is interpolated in ln sigma.
    """
    levels = DDPM_LEVELS.to(t, non_blocking=True)
    wanted = (base_std * (1 - t) / t).log()
    after = torch.searchsorted(levels, wanted.detach().contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[after - 1], levels[after]
    level = after - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
    return Reading((((1 - t) * base_std) ** 2 + t**2).rsqrt(), level, 1 / t, -base_std / t)


PARAMETRISATIONS = {
    "velocity": Parametrisation(velocity),
    "rectified_flow": Parametrisation(rectified_flow),
    "denoiser": Parametrisation(denoiser, (0.002, 80.0)),
    "edm": Parametrisation(edm, (0.002, 80.0)),
    "ddpm": Parametrisation(ddpm, (math.exp(DDPM_LEVELS[0]), math.exp(DDPM_LEVELS[-1]))),
}


@dataclass(frozen=True)
class ConvertedDrift:
    """b_t(x) = c_skip x + c_out F(c_in x, c_noise, label) of a model F in another parametrisation.

    Outside ``t_range`` the drift is that of the nearest time inside. If the model has twice the channels of x, the
    second half predicts a variance and is dropped.
    """

    model: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    parametrisation: Parametrisation
    base_std: float = 1.0
    data_std: float = 1.0

    @property
    def t_range(self) -> tuple[float, float]:
        """Times on which the model was trained."""
        return self.parametrisation.t_range(self.base_std)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return b_t(x) for x [B, ...] and t [B]."""
        c_in, c_noise, c_skip, c_out = self.parametrisation(t, self.base_std, self.data_std)
        c_in, c_skip, c_out = (expand(c, x).to(x.dtype) for c in (c_in, c_skip, c_out))
        return c_skip * x + c_out * self.model(c_in * x, c_noise, label)[:, : x.shape[1]]


def denoiser_drift(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    base_std: float = 0.5,
    noise: tuple[float, float] = (0.002, 80.0),
) -> ConvertedDrift:
    """Return the drift of a denoiser E[x1 | x1 + sigma e = y], called as ``denoise(y, sigma, label)``.

    ``noise`` is the range of noise levels it was trained on.

    b_t(x) = (D(x / t, sigma) - x) / (1 - t): loses digits as 1 - t gets small, so the lower noise level should not be
    far below 1e-3 in float32.
    """
    return ConvertedDrift(denoise, Parametrisation(PARAMETRISATIONS["denoiser"].read, noise), base_std)


def noise_drift(predict: Callable[[Tensor, Tensor, Tensor | None], Tensor], base_std: float = 1.0) -> ConvertedDrift:
    """Return the drift of ``predict(z, k, label)``, the noise in z at DDPM's time k in [0, 999] (linear variances)."""
    return ConvertedDrift(predict, PARAMETRISATIONS["ddpm"], base_std)
