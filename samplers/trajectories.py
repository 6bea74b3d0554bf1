"""Whole paths of a solver: what mid-training regresses on, and what step sizes are chosen from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.callables import Drift
from samplers.grids import check_times
from samplers.solvers import dpm_solver, euler, heun

SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "dpm_solver": dpm_solver}


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
    """The states of ``solver``, a key of ``SOLVERS``, from ``x`` [B, ...] at ``times[0]`` along the grid.

    With ``every`` > 1 only each so-manieth state is kept; the grid's last one must be among them.
    """
    if (len(times) - 1) % every:
        raise ValueError(f"{len(times) - 1} steps are no multiple of every = {every}")
    states: list[Tensor] = []

    def keep(k: int, t: Tensor, state: Tensor) -> None:
        if k % every == 0:
            states.append(state)

    SOLVERS[solver](drift, x, times, label, keep)
    return Trajectory(times[::every], torch.stack(states), label)
