"""Solvers for the probability-flow ODE dx/dt = b_t(x) over an explicit time grid."""

import math

import torch
from torch import Tensor

from samplers.callables import Callback, Drift, expand, intervals, report, rounded
from samplers.grids import Times


def euler(
    drift: Drift,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, order 1: x <- x + (t - s) b_s(x), one network evaluation per step.

    Args:
        drift: A drift b(x, t, label), such as ``fm.drift``.
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
        >>> euler(fm.drift, fm.noise(16, seed=0), uniform_times(64), torch.arange(16) % 10).shape
        torch.Size([16, 1, 8, 8])
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        x = x + expand(t - s, x).to(x.dtype) * drift(x, s, label)
    report(callback, len(times) - 1, t, x)
    return x


def heun(
    drift: Drift,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method (explicit trapezoid), order 2: two network evaluations per step.

    x' = x + h b_s(x), then x <- x + h (b_s(x) + b_t(x')) / 2. Diffusion samplers end with a plain Euler step to
    avoid a singularity; that is not needed here, since b_1 is finite. Arguments as in ``euler``.
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        h = expand(t - s, x).to(x.dtype)
        b = drift(x, s, label)
        x = x + h / 2 * (b + drift(x + h * b, t, label))
    report(callback, len(times) - 1, t, x)
    return x


def midpoint(
    drift: Drift,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Explicit midpoint method, order 2: two network evaluations per step.

    x <- x + h b_m(x + h/2 b_s(x)) with m = (s + t) / 2. The drift is never evaluated at the end of the grid. Arguments
    as in ``euler``.
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        h = expand(t - s, x).to(x.dtype)
        x = x + h * drift(x + h / 2 * drift(x, s, label), torch.lerp(s, t, 0.5), label)
    report(callback, len(times) - 1, t, x)
    return x


def dpm_solver(
    drift: Drift,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    callback: Callback | None = None,
    *,
    order: int = 3,
) -> Tensor:
    """DPM-Solver++, multistep, of order 1, 2 or 3 on the linear path: one network evaluation per step.

    Lu et al. 2022 (arXiv 2211.01095) with t for their alpha and 1 - t for their sigma. The data prediction
    D = x + (1 - s) b_s(x) is integrated as a polynomial in l = ln(t / (1 - t)) through its latest ``order`` values.
    At order 2 the slope acts as at the step's midpoint in time, which is the form that others call DPM-Solver++(2M).
    The order starts at 1 and rises; it is 1 wherever l is infinite, i.e. at times 0 and 1. Order 3 is therefore reached
    on grids that start close to noise, where D hardly changes, such as ``log_snr_times(n, 0.006, ...)``; on grids from
    t = 0.1 the overall order is 2. Arguments as in ``euler``.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    known: list[tuple[float, Tensor]] = []  # (l, D) of the latest steps, newest first
    numbers = rounded(times, x).tolist()  # read at once, so that no step waits for the device
    for k, (s, t) in enumerate(intervals(x, times)):  # noqa: B007 - t is reported below
        report(callback, k, s, x)
        start, end = numbers[k : k + 2]
        known = [(_log_snr(start), x + expand(1 - s, x).to(x.dtype) * drift(x, s, label)), *known][:order]
        finite = [entry for entry in known if math.isfinite(entry[0])] if math.isfinite(_log_snr(end)) else []
        x = (1 - end) / (1 - start) * x + end * _integral(finite or known[:1], _log_snr(end), order)
    report(callback, len(times) - 1, t, x)
    return x


def _log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if 0 < t < 1 else math.copysign(math.inf, t - 0.5)


def _integral(known: list[tuple[float, Tensor]], end: float, order: int) -> Tensor:
    """Integrate exp(l - end) D(l) over l from the newest entry of ``known`` to ``end``, D a polynomial through all.

    At order 2 the line through two entries is replaced by its value half a step ahead, of which less error is left
    (docs/sampling.md); order 3 begins with the exact integral.
    """
    (start, d0), *before = known
    h = end - start
    one = -math.expm1(-h)
    if not before:
        return one * d0
    l1, d1 = before[0]
    slope = (d0 - d1) / (start - l1)
    first = h - one  # of exp(l - end) (l - start), and below of (l - start)^2
    if len(before) == 1:
        return one * d0 + (one * h / 2 if order == 2 else first) * slope
    l2, d2 = before[1]
    bend = (slope - (d1 - d2) / (l1 - l2)) / (start - l2)
    return one * d0 + first * (slope + (start - l1) * bend) + (h * h - 2 * first) * bend
