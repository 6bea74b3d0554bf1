"""Types of the callables that samplers work on, and the loop they share.

A drift is ``b(x, t, label) -> dx/dt``; a map is ``X(x, s, t, label) -> x_t``. ``x`` has shape [B, ...], times have
shape [B] and ``label`` is an int64 tensor [B] or None.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from samplers.grids import Times, check_times

Drift = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Map = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]  # called as callback(k, t_k, x_k) for k = 0 .. N


def intervals(x: Tensor, times: Times) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (s, t) for each interval of the grid, both of shape [B], on the device of ``x``.

    Times keep at least float32 precision: rounded to the type of a bfloat16 sample, the grid would move.
    """
    grid = rounded(times, x).to(x.device, non_blocking=True)
    for s, t in pairwise(grid):
        yield s.expand(x.shape[0]), t.expand(x.shape[0])


def rounded(times: Times, x: Tensor) -> Tensor:
    """Return ``times``, checked, in the precision in which ``intervals`` yields them."""
    return check_times(times).to(torch.promote_types(x.dtype, torch.float32))


def report(callback: Callback | None, k: int, t: Tensor, x: Tensor) -> None:
    """Call ``callback(k, t, x)`` with t a scalar tensor, if a callback is given."""
    if callback is not None:
        callback(k, t[0], x)


def expand(value: Tensor, x: Tensor) -> Tensor:
    """View a per-sample value [B] as [B, 1, ...] so that it broadcasts against ``x`` [B, ...]."""
    return value.view(-1, *[1] * (x.ndim - 1))
