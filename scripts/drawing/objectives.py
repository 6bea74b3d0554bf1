"""The comparison that each objective makes, on two Gaussians in one dimension, whose drift is known exactly.

The map drawn is wrong on purpose: its velocity is a mean of the exact one and the drift at the start.
"""

import math
from typing import Any

import torch
from benchmarks.step_sizes import Mixture

from drawing.style import BLUE, GREEN, GREY, ORANGE, arrow, panels
from flowmaps import FlowMap, FlowMapInfo
from samplers import heun

S, T, X = 0.3, 0.85, 0.16  # the jump from X at S to T
DS = 0.2  # by which the Eulerian panel moves the start
WRONG = 0.6  # share of the drift at the start
STD = 0.2
LOW, HIGH = -0.05, 1.1  # heights shown
FLOW = FlowMap(Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([STD])), info=FlowMapInfo(shape=(1,), kind="drift"))


@torch.no_grad()
def velocity(x: float, t: float) -> float:
    """Return the exact drift b_t(x)."""
    return float(FLOW.drift(torch.tensor([[x]]), torch.tensor([t])))


@torch.no_grad()
def exact(x: float, s: float, t: float) -> float:
    """Return the exact X_{s,t}(x)."""
    if t - s < 1e-4:
        return x
    steps = torch.linspace(s, t, 101, dtype=torch.float64)
    return float(heun(FLOW.drift, torch.tensor([[x]]), steps))


def jump(x: float, s: float, t: float) -> float:
    """Return the end of the wrong map's jump."""
    return (1 - WRONG) * exact(x, s, t) + WRONG * (x + (t - s) * velocity(x, s))


def background(panel: Any) -> None:
    """Draw the law of I_t at each time, and the exact path from X at S."""
    t, x = torch.linspace(0, 1, 200), torch.linspace(LOW, HIGH, 200)[:, None]
    std = ((1 - t) ** 2 + (t * STD) ** 2).sqrt()
    law = sum(torch.exp(-(((x - mean * t) / std) ** 2) / 2) / (2 * math.sqrt(2 * math.pi) * std) for mean in (-1, 1))
    extent = (0, 1, LOW, HIGH)
    panel.imshow(law, extent=extent, origin="lower", aspect="auto", cmap="Greys", vmin=-0.05, vmax=2.2, alpha=0.8)
    times = torch.linspace(S, 1, 60)[1:].tolist()
    panel.plot(times, [exact(X, S, t) for t in times], color=GREY, linewidth=1.1)
    panel.plot(S, X, "o", color=GREY, markersize=5, zorder=6)
    panel.set(xlabel="time", xlim=(0, 1.3), ylim=(LOW, HIGH), yticks=[])
    panel.set_xticks([0, S, T, 1], ["0", "s", "t", "1"])
    panel.spines.bottom.set_bounds(0, 1)


def lagrangian(panel: Any) -> None:
    """Draw the wrong map's end as t moves, and the two velocities at t."""
    times = torch.linspace(S, T, 40).tolist()
    panel.plot(times, [jump(X, S, t) for t in times], color=ORANGE)
    end, h = jump(X, S, T), 1e-2
    slopes = {ORANGE: (jump(X, S, T + h) - jump(X, S, T - h)) / (2 * h), BLUE: velocity(end, T)}
    for colour, slope in slopes.items():
        arrow(panel, (T, end), (T + 0.15, end + 0.15 * slope), colour)
    panel.annotate("$\\partial_t X_{s,t}$", (T + 0.17, end + 0.15 * slopes[ORANGE]), color=ORANGE, va="center")
    panel.annotate("$b_t(X_{s,t})$", (T + 0.17, end + 0.15 * slopes[BLUE]), color=BLUE, va="center")


def eulerian(panel: Any) -> None:
    """Draw the jumps from the start and from a start that has moved along the drift."""
    u, later = S + DS, exact(X, S, S + DS)
    ends = jump(X, S, T), jump(later, u, T)
    panel.plot([S, T], [X, ends[0]], color=ORANGE)
    panel.plot([u, T], [later, ends[1]], color=BLUE)
    arrow(panel, (S, X), (u, later), GREEN)
    gap(panel, *ends)
    panel.annotate("s moves on", ((S + u) / 2, X - 0.05), color=GREEN, va="top", ha="center")
    panel.annotate("from s", (T + 0.04, ends[0]), color=ORANGE, va="top")
    panel.annotate("from later", (T + 0.04, ends[1]), color=BLUE, va="bottom")


def progressive(panel: Any) -> None:
    """Draw one jump, and two from half to half."""
    u = (S + T) / 2
    middle = jump(X, S, u)
    ends = jump(X, S, T), jump(middle, u, T)
    panel.plot([S, T], [X, ends[0]], color=ORANGE)
    panel.plot([S, u, T], [X, middle, ends[1]], color=BLUE, marker="o", markersize=4, markevery=[1])
    gap(panel, *ends)
    panel.annotate("one jump", (T + 0.04, ends[0]), color=ORANGE, va="top")
    panel.annotate("two jumps", (T + 0.04, ends[1]), color=BLUE, va="bottom")


def gap(panel: Any, low: float, high: float) -> None:
    """Mark the distance of two ends at T."""
    panel.plot([T, T], [low, high], color="black", linewidth=2.2, zorder=4)


def draw() -> Any:
    figure, axes = panels(3, 2.9, sharey=True)
    shown = {"Lagrangian": lagrangian, "Eulerian": eulerian, "Progressive": progressive}
    for panel, (title, paint) in zip(axes, shown.items(), strict=True):
        background(panel)
        paint(panel)
        panel.set_title(title)
    axes[0].annotate("exact path", (0.6, exact(X, S, 0.6) + 0.1), color=GREY, ha="right")
    return figure
