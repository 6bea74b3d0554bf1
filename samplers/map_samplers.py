"""Samplers that use a flow map: plain jumps along a time grid, or jumps with fresh noise at each step."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from samplers.callables import Callback, Map, expand, intervals, report, rounded
from samplers.grids import Times


def rollout(fm: Map, x: Tensor, times: Times, label: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Apply the map along the grid: x <- X_{t_i, t_{i+1}}(x), one network evaluation per interval.

    Deterministic sampling of Boffi et al. 2025 (arXiv 2505.18825), section 3.

    Args:
        fm: A map X(x, s, t, label), such as a ``FlowMap``.
        x: States [B, ...] at time ``times[0]``; noise if that is 0.
        times: Increasing times in [0, 1], one more than there are steps.
        label: Class labels int64 [B], or None.
        callback: Called as ``callback(k, t_k, x_k)`` for k = 0 .. N with the state at each grid time.

    Returns:
        The states at ``times[-1]``, same shape as ``x``.

    Raises:
        ValueError: ``times`` is not an increasing grid in [0, 1].

    Example:
        >>> fm = FlowMap.from_pretrained("assets/digits")
        >>> rollout(fm, fm.noise(16, seed=0), uniform_times(2), torch.arange(16) % 10).shape
        torch.Size([16, 1, 8, 8])
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        x = fm(x, s, t, label)
    report(callback, len(times) - 1, t, x)
    return x


class Path(Protocol):
    """Coefficients of an interpolant; ``time(r)`` is the t at which alpha(t) / beta(t) = r."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def beta(self, t: Tensor) -> Tensor: ...
    def time(self, ratio: Tensor) -> Tensor: ...


def stochastic(
    fm: Map,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
    *,
    path: Path,
    noise: Callable[[int], Tensor],
    gamma: float = 1.0,
) -> Tensor:
    """Jump beyond each grid time, then re-noise back to it: one network evaluation per step.

    The gamma sampler of Kim et al. 2024 (CTM, arXiv 2310.02279) in this package's time convention. With sigma = alpha /
    beta, the step to t jumps to the time u where sigma_u = sqrt(1 - gamma^2) sigma_t; then x_t = beta_t / beta_u x_u +
    gamma alpha_t z. gamma = 0 is ``rollout``; gamma = 1 jumps to data and back, the multistep sampler of consistency
    models. With the exact map every marginal is right for any gamma.

    ``noise(k)`` returns the noise z of step k, with the shape and standard deviation of x0. Shapes as in ``rollout``.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    numbers = rounded(times, x).tolist()  # read at once, so that no step waits for the device
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        u = path.time((1 - gamma**2) ** 0.5 * path.alpha(t) / path.beta(t))
        x_u = fm(x, s, u, label)
        x = expand(path.beta(t) / path.beta(u), x).to(x.dtype) * x_u
        if gamma and numbers[k + 1] < 1:  # data has no noise to renew
            x = x + gamma * expand(path.alpha(t), x).to(x.dtype) * noise(k)
    report(callback, len(times) - 1, t, x)
    return x
