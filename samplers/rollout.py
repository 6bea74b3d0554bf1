"""Few-step sampling with a learned flow map."""

from torch import Tensor

from samplers.callables import Callback, Map, intervals, report


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
