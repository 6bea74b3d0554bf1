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
