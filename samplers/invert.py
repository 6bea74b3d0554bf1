"""From data to noise: the map inverted by a fixed point through the forward network, or the drift run backwards."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.callables import Callback, Drift, Map, intervals
from samplers.grids import Times, check_times
from samplers.map_samplers import rollout
from samplers.solvers import heun

DAMPING, FLOOR = 1e-6, 1e-30  # of the least squares, per step that is mixed: relative and absolute


class Inverted(NamedTuple):
    """Noise that ``rollout`` over the same grid carries back to the data, and how closely."""

    noise: Tensor  # [B, ...] at times[0]
    rebuilt: Tensor  # [B, ...]: ``rollout`` of it
    error: Tensor  # [B]: root mean square of rebuilt - data, per sample


@torch.no_grad()
def invert(
    fm: Map,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
    *,
    iterations: int = 8,
    memory: int = 5,
) -> Inverted:
    """Solve X_{s,t}(z) = x for z on each interval, from the last to the first, by Anderson's iteration.

    The fixed point of z <- z + x - X_{s,t}(z), which alone may diverge: a map collapses noise onto data, so that its
    slopes lie near 0. Mixing the latest ``memory`` steps by least squares (Anderson 1965) makes it converge. Only the
    network with s < t is evaluated: ``iterations`` times per interval, and once more to rebuild. Noise is not
    identifiable where the map collapses it: compare data, not noise.

    Args:
        fm: A map X(x, s, t, label).
        x: Data [B, ...] at ``times[-1]``.
        times: Increasing times in [0, 1]. Rebuild on the same grid: another one has another inverse.
        label: Class labels int64 [B], or None.
        callback: Called as ``callback(k, t_k, x_k)`` for k = N .. 0 with the state at each grid time.
        iterations: Network evaluations per interval.
        memory: Steps that are mixed.

    Returns:
        The noise, the data rebuilt from it, and the error of these.

    Raises:
        ValueError: ``times`` is not a grid, or ``iterations`` or ``memory`` is below 1.

    Example:
        >>> found = invert(fm, images, uniform_times(4), label)
        >>> edited = rollout(fm, found.noise, uniform_times(4), other_label)
    """
    if iterations < 1 or memory < 1:
        raise ValueError(f"invert needs iterations and memory of at least 1, got {iterations} and {memory}")
    z, steps = x, list(intervals(x, times))
    for k, (s, t) in reversed(list(enumerate(steps, start=1))):
        if callback is not None:
            callback(k, t[0], z)
        z = _solved(fm, z, s, t, label, iterations, memory)
    if callback is not None:
        callback(0, s[0], z)
    rebuilt = rollout(fm, z, times, label)
    return Inverted(z, rebuilt, (rebuilt - x).square().flatten(1).mean(dim=1).sqrt())


def _solved(fm: Map, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None, iterations: int, memory: int) -> Tensor:
    """Return z with X_{s,t}(z) close to x: Anderson's iteration from z = x."""
    z, points, residuals = x, list[Tensor](), list[Tensor]()
    for _ in range(iterations):
        residual = x - fm(z, s, t, label)
        points, residuals = [*points, z][-memory - 1 :], [*residuals, residual][-memory - 1 :]
        z = z + residual
        if len(points) > 1:
            dz, df = (torch.stack([b - a for a, b in pairwise(p)], dim=1).flatten(2) for p in (points, residuals))
            df64 = df.double()  # [B, m, dim]
            square = df64 @ df64.mT
            square = square + torch.diag_embed(DAMPING * square.diagonal(dim1=1, dim2=2) + FLOOR)
            share = torch.linalg.solve(square, df64 @ residual.double().flatten(1)[:, :, None])  # [B, m, 1]
            z = z - ((dz + df).double() * share).sum(dim=1).to(x.dtype).view_as(x)
    return z


@torch.no_grad()
def invert_drift(drift: Drift, x: Tensor, times: Times, label: Tensor | None = None) -> Tensor:
    """Integrate the drift from data [B, ...] at ``times[-1]`` back to ``times[0]`` by Heun's method.

    Two network evaluations per step. With the exact drift and small steps this is the same noise; with a learned map
    the drift's noise is not rebuilt exactly (docs/steering.md).
    """
    grid = check_times(times)
    return heun(lambda z, r, y: -drift(z, 1 - r, y), x, (1 - grid).flip(0), label)


__all__ = ["Inverted", "invert", "invert_drift"]
