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
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from flowmaps.errors import shorten
from samplers.callables import expand

EDM_NOISE = (0.002, 80.0)  # the noise levels that EDM's sampler uses


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


def noise_at_one(t: Tensor, base_std: float, data_std: float) -> Reading:
    """F is minus the drift, with time from data to noise, as most published maps have it: SoFlow, MeanFlow SiT, DMF."""
    one = torch.ones_like(t)
    return Reading(one, 1 - t, torch.zeros_like(t), -one)


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


def consistency(t: Tensor, base_std: float, data_std: float, least: float = 0.0) -> Reading:
    """F is the raw network of a consistency model in EDM's preconditioning, which is the identity at level ``least``.

    ECT (Geng et al. 2024, arXiv 2406.14548): D(y, sigma) = k y + (sigma - least) data_std / r F(y / r, ln(sigma) / 4),
    with r^2 = sigma^2 + data_std^2 and k = data_std^2 / ((sigma - least)^2 + data_std^2), is the map of y = x1 + sigma
    e to data. So v = (D - x) / (1 - t) is the average velocity from t to 1. From noise levels above 80, and from noise
    alone, the map is the one from 80, as in its sampler.
    """
    sigma = base_std * (1 - t) / t.clamp(min=base_std / (base_std + EDM_NOISE[1]))
    sigma = sigma.clamp(max=EDM_NOISE[1])
    grow = sigma / (base_std * (1 - t))  # y = grow x
    c_in = (sigma**2 + data_std**2).rsqrt()
    kept = data_std**2 / ((sigma - least) ** 2 + data_std**2)
    c_out = (sigma - least) * data_std * c_in / (1 - t)
    return Reading(c_in * grow, sigma.log() / 4, (kept * grow - 1) / (1 - t), c_out)


def variances(schedule: str, steps: int, start: float = 0.0, end: float = 0.0) -> Tensor:
    """Return the variances beta at the ``steps`` times of a schedule, float32 [steps], as diffusers rounds them.

    "linear" (Ho et al. 2020, arXiv 2006.11239) from ``start`` to ``end``, "scaled_linear" (the same of their roots), or
    "squaredcos_cap_v2" (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17).
    """
    if schedule == "squaredcos_cap_v2":
        places = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        kept = ((places + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - kept[1:] / kept[:-1]).clamp(max=0.999).float()
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def levels_of(betas: Tensor, zero_snr: bool = False) -> Tensor:
    """Return ln sigma at each time, float64, for variances ``betas`` in (0, 1); products are of the type of ``betas``.

    With ``zero_snr``, the last time has next to no image (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    kept = (1 - betas).cumprod(0).double()
    if zero_snr:
        roots = kept.sqrt()
        kept = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        kept[-1] = torch.minimum(kept[-2] / 4, kept.new_tensor(2.0**-24))  # none at all would be an infinite sigma
    return ((1 - kept) / kept).log() / 2


DDPM_LEVELS = levels_of(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu"))


def ddpm(t: Tensor, base_std: float, data_std: float, predicts: str = "noise", table: Tensor = DDPM_LEVELS) -> Reading:
    """F(z, k) is about z = a x1 + s e = (x1 + sigma e) / sqrt(1 + sigma^2), at discrete times k: DDPM, DiT.

    It predicts the "noise" e: b = (x - base_std F) / t; the "data" x1: b = (F - x) / (1 - t); or the "velocity"
    a e - s x1 (Salimans and Ho 2022, arXiv 2202.00512): b = (a - base_std s) z - (s + base_std a) F. ``table`` has ln
    sigma at each k; between two times, k is interpolated in ln sigma.
    """
    levels = table.to(t, non_blocking=True)
    wanted = (base_std * (1 - t) / t).log()
    below = (levels < wanted.detach()[:, None]).sum(dim=1)  # torch.searchsorted, which ONNX does not have
    after = below.clamp(1, len(levels) - 1)
    low, high = levels[after - 1], levels[after]
    level = after - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
    c_in = (((1 - t) * base_std) ** 2 + t**2).rsqrt()
    if predicts == "noise":
        return Reading(c_in, level, 1 / t, -base_std / t)
    if predicts == "data":
        return Reading(c_in, level, -1 / (1 - t), 1 / (1 - t))
    a, s = t * c_in, (1 - t) * base_std * c_in
    return Reading(c_in, level, (a - base_std * s) * c_in, -(s + base_std * a))


def discrete(predicts: str, table: Tensor) -> Parametrisation:
    """Return ``ddpm`` for a table of ln sigma.

    A prediction of noise is read up to the last level of DDPM's own times: above, 1 / t makes more of its error than of
    the image.
    """
    least, last = float(table[0]), float(table[-1])
    last = min(last, float(DDPM_LEVELS[-1])) if predicts == "noise" else last
    return Parametrisation(partial(ddpm, predicts=predicts, table=table), (math.exp(least), math.exp(last)))


PARAMETRISATIONS = {
    "velocity": Parametrisation(velocity),
    "noise_at_one": Parametrisation(noise_at_one),
    "rectified_flow": Parametrisation(rectified_flow),
    "denoiser": Parametrisation(denoiser, EDM_NOISE),
    "edm": Parametrisation(edm, EDM_NOISE),
    "consistency": Parametrisation(consistency, (EDM_NOISE[0], math.inf)),
    "ddpm": discrete("noise", DDPM_LEVELS),
}
PREDICTED, SCHEDULES = ("noise", "velocity", "data"), ("linear", "scaled_linear", "squaredcos_cap_v2")
MOST_STEPS = 100_000  # of a schedule


@cache
def parametrisation(convention: str) -> Parametrisation:
    """Return the parametrisation of a name, which may have numbers after colons.

    * a key of ``PARAMETRISATIONS``;
    * "consistency:LEAST", of ``consistency``;
    * "ddpm:PREDICTS:SCHEDULE:STEPS:START:END", of ``ddpm`` and ``variances`` (squaredcos_cap_v2 ends with its
      steps); ":zero_snr" may follow;
    * "ddpm:PREDICTS:betas:B1:B2:...", with every variance; ":zero_snr" may follow.

    Raises:
        ValueError: There is no such name, or a number is out of range.
    """
    if convention in PARAMETRISATIONS:
        return PARAMETRISATIONS[convention]
    name, *given = convention.split(":")
    zero_snr = given[-1:] == ["zero_snr"]
    words, numbers = given[:2] if name == "ddpm" else [], given[2 : len(given) - zero_snr] if name == "ddpm" else given
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    if name == "consistency" and len(values) == 1 and 0 <= values[0] < 1:
        read = partial(consistency, least=values[0])
        return Parametrisation(read, (max(values[0], EDM_NOISE[0]), math.inf))
    if len(words) == 2 and words[0] in PREDICTED and (table := _table(words[1], values, zero_snr)) is not None:
        return discrete(words[0], table)
    raise ValueError(
        f"convention must be one of {', '.join(PARAMETRISATIONS)}, one of them with numbers, or empty, "
        f"got {shorten(convention, 80)}"
    )


def _table(schedule: str, values: list[float], zero_snr: bool) -> Tensor | None:
    if schedule == "betas":
        steps, ends = float(len(values)), values
    else:
        steps, ends = values[0] if values else math.nan, values[1:]
        if schedule not in SCHEDULES or len(ends) != (0 if schedule == "squaredcos_cap_v2" else 2):
            return None
    if not 2 <= steps <= MOST_STEPS or steps != int(steps) or not all(0 < beta < 1 for beta in ends):
        return None
    betas = torch.tensor(ends, device="cpu") if schedule == "betas" else variances(schedule, int(steps), *ends)
    levels = levels_of(betas, zero_snr)
    return levels if (levels.diff() > 0).all() and levels.isfinite().all() else None


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
    noise: tuple[float, float] = EDM_NOISE,
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
