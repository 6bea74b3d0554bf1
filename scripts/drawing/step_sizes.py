"""Fitted step sizes on a ring of eight narrow Gaussians, whose drift is known: errors, grids, and what they gain."""

import json
from typing import Any

import torch
from benchmarks.step_sizes import EXACT, STEPS
from matplotlib.ticker import NullLocator
from torch import Tensor

from drawing.style import BLUE, GREY, ORANGE, ROOT, panels
from flowmaps import FlowMap, FlowMapInfo
from flowmaps.step_sizes import FINE, costs
from samplers import uniform_times
from samplers.bellman import solve_all

RING = "ring-1"


def errors(panel: Any, cost: dict[str, Tensor]) -> None:
    """Draw the error of one Euler step of length 1/8 by the time at which it starts."""
    fine = FINE["euler"]
    length = fine // 8
    starts = torch.arange(fine + 1 - length)
    for name, colour, text, place in (
        ("local", GREY, "at its own end", (0.03, 0.033)),
        ("end", ORANGE, "carried to data", (0.42, 0.0011)),
    ):
        panel.plot(starts / fine, cost[name][starts, starts + length].sqrt(), color=colour)
        panel.annotate(text, place, color=colour)
    panel.set(yscale="log", xlabel="start of a step of 1/8", title="Error of one Euler step", xlim=(0, 1))


def grids(panel: Any, cost: Tensor) -> None:
    """Draw equal and fitted times for each number of steps."""
    solved, times = solve_all(cost, max(STEPS)), uniform_times(FINE["euler"])
    for row, steps in enumerate(STEPS):
        fitted = times[solved[steps][0]]
        for grid, place, colour in ((uniform_times(steps), row + 0.14, GREY), (fitted, row - 0.14, BLUE)):
            panel.plot(grid, [place] * (steps + 1), "|", color=colour, markersize=10, markeredgewidth=1.8)
    panel.set_yticks(range(len(STEPS)), [f"{steps} steps" for steps in STEPS])
    panel.set(xlabel="time", title="Times of the steps", xticks=[0, 0.5, 1], ylim=(len(STEPS) - 0.5, -0.5))
    panel.spines.left.set_visible(False)
    panel.tick_params(axis="y", length=0)


def gain(panel: Any) -> None:
    """Draw the recorded distance of the samples to the exact solution."""
    records = json.loads((ROOT / "assets/bellman-exact.json").read_text())["records"]
    for row, colour, text, place in (
        ("equal steps", GREY, "equal", (4.3, 0.11)),
        ("Bellman, end", BLUE, "fitted", (2.9, 0.0265)),
    ):
        [scores] = [record["scores"] for record in records if record["row"] == f"{RING}, {row}"]
        panel.plot(STEPS, [scores[f"W2@{steps}"] for steps in STEPS], "o-", color=colour, markersize=4.5)
        panel.annotate(text, place, color=colour)
    panel.set(yscale="log", xticks=STEPS, xlabel="Euler steps", title="Distance to ODE samples")
    panel.set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.25)


def draw() -> Any:
    network = EXACT[RING]()
    fm = FlowMap(network, info=FlowMapInfo(shape=(2,), kind="drift"))
    cost = costs(fm, "euler", ("local", "end"), noises=512)
    figure, (left, middle, right) = panels(3, 2.6)
    errors(left, cost)
    grids(middle, cost["end"])
    gain(right)
    return figure
