"""Solvers for the probability-flow ODE dx/dt = b_t(x) over an explicit time grid."""

import math

from torch import Tensor

from samplers.callables import Callback, Drift, expand, intervals, report


def euler(
    drift: Drift, x: Tensor, times: Tensor, label: Tensor | None = None, callback: Callback | None = None
) -> Tensor:
    """Euler's method, order 1: x <- x + (t - s) b_s(x), one network evaluation a step.

    ``x`` [B, ...] at time ``times[0]``; returns the state at ``times[-1]``, same shape.
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        x = x + expand(t - s, x).to(x.dtype) * drift(x, s, label)
    report(callback, len(times) - 1, t, x)
    return x


def heun(
    drift: Drift, x: Tensor, times: Tensor, label: Tensor | None = None, callback: Callback | None = None
) -> Tensor:
    """Heun's method (explicit trapezoid), order 2: two network evaluations a step.

    x' = x + h b_s(x), then x <- x + h (b_s(x) + b_t(x')) / 2. The usual last step of diffusion samplers, a plain Euler
    step to avoid the singular end, is not needed here: b_1 is finite. Shapes as in ``euler``.
    """
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        h = expand(t - s, x).to(x.dtype)
        b = drift(x, s, label)
        x = x + h / 2 * (b + drift(x + h * b, t, label))
    report(callback, len(times) - 1, t, x)
    return x


def dpm_solver(
    drift: Drift,
    x: Tensor,
    times: Tensor,
    label: Tensor | None = None,
    callback: Callback | None = None,
    *,
    order: int = 3,
) -> Tensor:
    """DPM-Solver++, multistep, of order 1, 2 or 3 on the linear path: one network evaluation a step.

    Lu et al. 2022 (arXiv 2211.01095), data prediction D = x + (1 - s) b_s(x), with t for their alpha and 1 - t for
    sigma: what is integrated is D as a polynomial in l = ln(t / (1 - t)), fitted to this step's D and those before.
    The order starts at 1 and rises, and is 1 wherever l is infinite, at times 0 and 1. So order 3 is reached on
    grids that start in noise, where D hardly changes, as ``log_snr_times(n, 0.006, ...)``; from t = 0.1 on it is 2 all
    in all. Shapes as in ``euler``.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    known: list[tuple[float, Tensor]] = []  # (l, D) of the latest steps, newest first
    for k, (s, t) in enumerate(intervals(x, times)):
        report(callback, k, s, x)
        start, end = float(s[0]), float(t[0])
        known = [(_log_snr(start), x + expand(1 - s, x).to(x.dtype) * drift(x, s, label)), *known][:order]
        finite = [entry for entry in known if math.isfinite(entry[0])] if math.isfinite(_log_snr(end)) else []
        x = (1 - end) / (1 - start) * x + end * _integral(finite or known[:1], _log_snr(end))
    report(callback, len(times) - 1, t, x)
    return x


def _log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if 0 < t < 1 else math.copysign(math.inf, t - 0.5)


def _integral(known: list[tuple[float, Tensor]], end: float) -> Tensor:
    """The integral of exp(l - end) D(l) over l from the newest of ``known`` to ``end``, D a polynomial through them."""
    (start, d0), *before = known
    h = end - start
    one = -math.expm1(-h)
    if not before:
        return one * d0
    l1, d1 = before[0]
    slope = (d0 - d1) / (start - l1)
    first = h - one  # of exp(l - end) (l - start), and below of (l - start)^2
    if len(before) == 1:
        return one * d0 + first * slope
    l2, d2 = before[1]
    bend = (slope - (d1 - d2) / (l1 - l2)) / (start - l2)
    return one * d0 + first * (slope + (start - l1) * bend) + (h * h - 2 * first) * bend
