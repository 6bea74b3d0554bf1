"""Plots of scores, of curves over training, and of step sizes with the costs that they were fitted to."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from flowmaps.errors import UserError
from flowmaps.markdown import counted
from flowmaps.step_sizes import FittedSchedule
from samplers import uniform_times

MARKERS = "osD^v<>PX*"
EVALUATIONS = "network evaluations per sample"


def pyplot() -> Any:
    """Import matplotlib's pyplot, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def picture(figure: Any) -> Image.Image:
    """Render a matplotlib figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot().close(figure)
    return Image.open(buffer)


def lines(
    points: Sequence[tuple[str, str, int, float]], floor: float | None = None, xlabel: str = EVALUATIONS
) -> Image.Image:
    """Plot (name, metric, x, value): a panel for each metric, two in a row, and a line for each name.

    Values of the same name and x are drawn as their mean, with the range as bars. Both axes are logarithmic.
    """
    plt = pyplot()
    metrics = list(dict.fromkeys(metric for _, metric, _, _ in points))
    names = list(dict.fromkeys(point[0] for point in points))
    styles = {  # after ten colours the same ones again, dashed
        name: {"color": f"C{i % 10}", "fmt": f"{MARKERS[i % len(MARKERS)]}{'-' if i < 10 else '--'}"}
        for i, name in enumerate(names)
    }
    shown: dict[str, Any] = {}
    across = min(2, len(metrics))
    down = math.ceil(len(metrics) / across)
    figure, panels = plt.subplots(
        down, across, layout="constrained", figsize=(6 * across, 4.2 * down), dpi=110, squeeze=False
    )
    for axes in panels.flat[len(metrics) :]:
        axes.remove()
    for axes, metric in zip(panels.flat, metrics, strict=False):
        mine = [point for point in points if point[1] == metric]
        steps = sorted({point[2] for point in mine})
        for name in dict.fromkeys(point[0] for point in mine):
            values = {n: [p[3] for p in mine if (p[0], p[2]) == (name, n)] for n in steps}
            values = {n: found for n, found in values.items() if found}
            mean = [sum(found) / len(found) for found in values.values()]
            below = [m - min(found) for m, found in zip(mean, values.values(), strict=True)]
            above = [max(found) - m for m, found in zip(mean, values.values(), strict=True)]
            look = {"capsize": 2, "markersize": 4, "linewidth": 1.3, "label": name, **styles[name]}
            shown[name] = axes.errorbar(list(values), mean, yerr=[below, above], **look)
        if floor is not None:
            shown["floor"] = axes.axhline(floor, color="grey", linestyle="--", label="floor: training images")
        axes.set(xscale="log", yscale="log", xlabel=xlabel, title=f"{metric} (lower is better)")
        for axis, subs, form in ((axes.xaxis, (1, 2, 5), "{:,g}"), (axes.yaxis, (1, 1.5, 2, 3, 5, 7), "{:g}")):
            axis.set_major_locator(plt.LogLocator(subs=subs))
            axis.set_major_formatter(plt.FuncFormatter(lambda value, _, form=form: form.format(value)))
            axis.set_minor_locator(plt.NullLocator())
        if len(steps) <= 8:
            axes.set_xticks(steps)
        axes.grid(alpha=0.3)
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=min(4, len(shown)), fontsize="small")
    return picture(figure)


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], across: int = 3) -> Image.Image:
    """Plot (training step, value) of runs by name, a panel for each quantity, ``across`` of them in a row.

    The vertical axis is logarithmic where positive values span more than a decade.
    """
    plt = pyplot()
    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(
        down, across, layout="constrained", figsize=(4.6 * across, 3.2 * down), dpi=110, squeeze=False
    )
    shown: dict[str, Any] = {}
    for panel, (quantity, runs) in zip(axes.flat, panels.items(), strict=False):
        for name, points in runs.items():
            i = names.index(name)
            look = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "linewidth": 1.3}
            marker = MARKERS[i % len(MARKERS)] if len(points) < 20 else ""
            (shown[name],) = panel.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name, **look)
        values = [value for points in runs.values() for _, value in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            panel.set_yscale("log")
        panel.set(title=quantity, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    handles = [shown[name] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize="small")
    return picture(figure)


def step_sizes(fitted: FittedSchedule) -> Image.Image:
    """Plot the times of each grid next to equal steps, and the matrix of costs with the grids' jumps in it."""
    schedule, cost = fitted
    figure, (left, right) = pyplot().subplots(1, 2, layout="constrained", figsize=(12, 4.5), dpi=110)
    dot = {"markersize": 6, "markeredgecolor": "white"}
    for row, (steps, times) in enumerate(schedule.items()):
        left.plot(uniform_times(steps), [row - 0.15] * (steps + 1), "|", color="grey", markersize=9)
        left.plot(times, [row + 0.1] * (steps + 1), "|", color=f"C{row}", markersize=14, markeredgewidth=2)
        index = (times * schedule.fine).round()
        right.plot(index[1:], index[:-1], "o", label=counted(steps, "step"), **dot, color=f"C{row}")
    left.set_yticks(range(len(schedule)), [counted(steps, "step") for steps in schedule])
    left.set(xlabel="time (0 noise, 1 data); grey: equal steps", ylim=(-0.6, len(schedule) - 0.4))
    drawn = right.imshow(cost.where(cost > 0, torch.nan).log10(), cmap="viridis")
    figure.colorbar(drawn, ax=right, label=f"log10 of the cost: {schedule.cost}")
    right.set(xlabel=f"to time (of {schedule.fine})", ylabel="from time")
    right.legend(fontsize="small", loc="lower left")
    return picture(figure)
