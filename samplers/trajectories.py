"""States along a solver's path: regression targets of mid-training, and the data that step sizes are fitted to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.callables import Drift
from samplers.grids import check_times
from samplers.table import SAMPLERS


@dataclass(frozen=True)
class Trajectory:
    """States [N + 1, B, ...] of B paths at ``times`` [N + 1], from noise towards data, and their label [B] or None."""

    times: Tensor
    states: Tensor
    label: Tensor | None = None

    def __post_init__(self) -> None:
        check_times(self.times)
        if self.states.ndim < 2 or len(self.states) != len(self.times):
            raise ValueError(f"states must be [N + 1, B, ...] with N + 1 = {len(self.times)}, got {self.states.shape}")
        if self.label is not None and len(self.label) != self.states.shape[1]:
            raise ValueError(f"label has {len(self.label)} rows, states have {self.states.shape[1]} paths")


@torch.no_grad()
def trajectory(
    drift: Drift, x: Tensor, times: Tensor, label: Tensor | None = None, solver: str = "heun", every: int = 1
) -> Trajectory:
    """Return the states of ``solver``, a sampler of drifts, from ``x`` [B, ...] at ``times[0]`` along the grid.

    Only every ``every``-th state is kept; it must divide the number of steps, so that the last state is among them.
    """
    if solver not in SAMPLERS or SAMPLERS[solver].of != "drift":
        drifts = ", ".join(name for name, row in SAMPLERS.items() if row.of == "drift")
        raise ValueError(f"solver must be one of {drifts}, got {solver!r}")
    if (len(times) - 1) % every:
        raise ValueError(f"{len(times) - 1} steps are not a multiple of every = {every}")
    states: list[Tensor] = []

    def keep(k: int, t: Tensor, state: Tensor) -> None:
        if k % every == 0:
            states.append(state)

    SAMPLERS[solver].run(drift, x, times, label, keep)
    return Trajectory(times[::every], torch.stack(states), label)
