"""Noise carried to data by the shipped checkerboard model: along the ODE's path, in one jump, and in two."""

from typing import Any

import torch
from torch import Tensor

from drawing.style import BLUE, GREY, ORANGE, PALE, ROOT, panels
from flowmaps import FlowMap
from samplers import rollout, trajectory, uniform_times

NOISES = 64  # of which those with the longest ways are drawn
SHOWN = 9
CLOUD = 4000  # samples in the background
SEED = 1
RING: Any = {"color": "none", "markeredgecolor": "black", "markersize": 8, "markeredgewidth": 0.8}


def jumps(fm: FlowMap, noise: Tensor, steps: int) -> Tensor:
    """Return the points of ``steps`` jumps from the noise [n, 2]: [steps + 1, n, 2]."""
    points = list[Tensor]()
    rollout(fm, noise, uniform_times(steps), callback=lambda k, t, x: points.append(x))
    return torch.stack(points)


@torch.no_grad()
def draw() -> Any:
    fm = FlowMap.from_pretrained(str(ROOT / "assets/checkerboard"))
    noise = fm.noise(CLOUD, seed=SEED)
    path = trajectory(fm.drift, noise[:NOISES], uniform_times(64), None, "heun").states
    longest = (path[-1] - path[0]).norm(dim=1).argsort(descending=True)[:SHOWN]
    path, chosen = path[:, longest], noise[longest]
    ways = {"The ODE in 64 small steps": path, "One jump": jumps(fm, chosen, 1), "Two jumps": jumps(fm, chosen, 2)}
    figure, axes = panels(3, 2.45)
    for panel, (title, way), steps in zip(axes, ways.items(), (8, 1, 2), strict=True):
        panel.plot(*rollout(fm, noise, uniform_times(steps)).T, ".", color=PALE, markersize=1.8, markeredgewidth=0)
        panel.plot(*way.permute(2, 0, 1), color=ORANGE, linewidth=1.3)
        panel.plot(*way[0].T, "o", color=GREY, markersize=4, label="noise")
        if len(way) == 3:
            panel.plot(*way[1].T, "o", color="white", markeredgecolor=ORANGE, markersize=4)
        panel.plot(*path[-1].T, "o", label="end of the ODE's path", **RING)
        panel.plot(*way[-1].T, "o", color=BLUE, markersize=4.5, label="sample")
        panel.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-1.5, 1.6), ylim=(-1.1, 1.15))
        panel.spines[:].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure
