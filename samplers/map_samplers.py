"""Sampling with a flow map: along a grid of times, without or with fresh noise at each step."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from samplers.callables import Callback, Map, expand, intervals, report


def rollout(fm: Map, x: Tensor, times: Tensor, label: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Apply the map along the grid: x <- X_{t_i, t_{i+1}}(x), one network evaluation an interval.

    Deterministic sampling of Boffi et al. 2025 (arXiv 2505.18825), section 3. ``x`` [B, ...] at time ``times[0]``;
    returns the state at ``times[-1]``, same shape.
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        x = fm(x, s, t, label)
    report(callback, len(times) - 1, t, x)
    return x


class Path(Protocol):
    """The interpolant's coefficients; ``time(r)`` is the t at which alpha(t) / beta(t) = r."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def beta(self, t: Tensor) -> Tensor: ...
    def time(self, ratio: Tensor) -> Tensor: ...


def stochastic(
    fm: Map,
    x: Tensor,
    times: Tensor,
    label: Tensor | None = None,
    callback: Callback | None = None,
    *,
    path: Path,
    noise: Callable[[int], Tensor],
    gamma: float = 1.0,
) -> Tensor:
    """Jump beyond each grid time, then re-noise back to it: one network evaluation a step.

    The gamma sampler of Kim et al. 2024 (CTM, arXiv 2310.02279), in this package's times. With sigma = alpha / beta,
    the step to t jumps to the time u of sigma_u = sqrt(1 - gamma^2) sigma_t; then x_t = beta_t / beta_u x_u + gamma
    alpha_t z. gamma = 0 is ``rollout``; gamma = 1 jumps to data and back, the multistep sampler of consistency models.
    The exact map keeps every marginal for any gamma.

    ``noise(k)``: the noise z of step k, same shape and standard deviation as x0. Shapes as in ``rollout``.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        u = path.time((1 - gamma**2) ** 0.5 * path.alpha(t) / path.beta(t))
        x_u = fm(x, s, u, label)
        x = expand(path.beta(t) / path.beta(u), x).to(x.dtype) * x_u
        if gamma and bool(t[0] < 1):  # data has no noise to renew
            x = x + gamma * expand(path.alpha(t), x).to(x.dtype) * noise(k)
    report(callback, len(times) - 1, t, x)
    return x
