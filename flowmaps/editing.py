"""From images to noise and back: reconstructions, and edits by another label."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import check_grid
from flowmaps.info import FlowMapInfo
from samplers import heun, rollout
from samplers.grids import Times
from samplers.invert import invert, invert_drift

ITERATIONS = 8  # network evaluations per step of an inversion


@dataclass(frozen=True)
class Rebuilt:
    """Images rebuilt from their noise."""

    samples: Tensor  # [n, C, H, W]: the reconstruction, or the edit
    noise: Tensor  # [n, C, H, W] at time 0
    error: Tensor  # [n]: root mean square of reconstruction - image, on [-1, 1], also of an edit
    nfe: int  # network evaluations per image, all in all


def inverting_sampler(info: FlowMapInfo) -> str:
    """Return the sampler that carries noise back to images: "map", of a drift "heun".

    Raises:
        UserError: The model only jumps to data, or makes latents or points.
    """
    if info.kind == "consistency":
        raise UserError("this model only jumps to data in one step, and has no path to follow back", field="invert")
    return "heun" if info.kind == "drift" else "map"


@torch.no_grad()
def rebuild(
    fm: FlowMap,
    x: Tensor,
    times: Times,
    label: Tensor | None = None,
    edit_label: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Rebuilt:
    """Carry images to noise under their ``label``, and from there to images under ``edit_label``, on the same grid.

    Brightness and texture are kept where the two classes allow it. Inversion is ``samplers.invert``; of a drift it is
    Heun's method backwards.

    Args:
        fm: A map or a drift.
        x: Images [n, C, H, W] in [-1, 1], ``flowmaps.rewards.pictures``.
        times: Increasing times from 0 to 1.
        label: Their classes int64 [n]; None for an unconditional model.
        edit_label: Other classes; None rebuilds the images themselves.
        iterations: Network evaluations per step of the inversion; of a drift they are two.

    Raises:
        UserError: The model only jumps to data, or the times do not lead from noise to data.

    Example:
        >>> fm = FlowMap.from_pretrained("assets/fashion_mnist")
        >>> x = pictures(fm.info, "shirt.png", "invert")
        >>> boot = rebuild(fm, x, uniform_times(4), torch.tensor([6]), torch.tensor([9])).samples
    """
    grid = check_grid(times)
    steps, by_map = len(grid) - 1, inverting_sampler(fm.info) == "map"
    if by_map:
        noise, rebuilt, error = invert(fm, x, grid, label, iterations=iterations)
        nfe = steps * (iterations + 1)
    else:
        noise = invert_drift(fm.drift, x, grid, label)
        rebuilt = heun(fm.drift, noise, grid, label)
        error, nfe = (rebuilt - x).square().flatten(1).mean(dim=1).sqrt(), 4 * steps
    if edit_label is not None:
        rebuilt = rollout(fm, noise, grid, edit_label) if by_map else heun(fm.drift, noise, grid, edit_label)
        nfe += steps if by_map else 2 * steps
    return Rebuilt(rebuilt, noise, error, nfe)
