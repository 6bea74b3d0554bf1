"""Solvers for the probability-flow ODE dx/dt = b_t(x) over an explicit time grid."""

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
