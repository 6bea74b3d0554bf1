"""Network evaluations against distance to held-out data, of the shipped checkpoints: from assets/results/*.json."""

import json
from typing import Any

from benchmarks.pages import CHECKPOINTS
from matplotlib.ticker import NullLocator

from drawing.style import BLUE, GREY, ORANGE, ROOT, panels

DRAWN = [name for name in CHECKPOINTS if (ROOT / f"assets/results/{name}-stored.json").exists()]


def curve(data: str, name: str, sampler: str) -> tuple[list[int], list[float]]:
    """Return evaluations and scores of one sampler in one record file."""
    record = json.loads((ROOT / f"assets/results/{data}-{name}.json").read_text())
    rows = [row for row in record["results"] if row["sampler"] == sampler]
    return [row["nfe"] for row in rows], [row[record["metric"]] for row in rows]


def draw() -> Any:
    figure, axes = panels(3, 2.7)
    for panel, data in zip(axes, DRAWN, strict=True):
        metric = json.loads((ROOT / f"assets/results/{data}-map.json").read_text())["metric"]
        for sampler, colour, marker in (("euler", ORANGE, "s"), ("map", BLUE, "o")):
            nfe, score = curve(data, sampler, sampler)
            panel.plot(nfe, score, color=colour, marker=marker, markersize=4.5)
            panel.plot(*curve(data, "stored", sampler), marker, color="white", markeredgecolor=colour, markersize=4.5)
        panel.set(xscale="log", yscale="log", title=CHECKPOINTS[data], xlabel="network evaluations", ylabel=metric)
        panel.set_xticks([1, 2, 4, 8, 64], ["1", "2", "4", "8", "64"])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.25)
    axes[0].annotate("Euler's method\non the same network", (2.2, 45), color=ORANGE)
    axes[0].annotate("flow map", (1.1, 3.6), color=BLUE)
    axes[2].annotate("hollow: stored steps", (70, 4.3), color=GREY, ha="right", va="top")
    return figure
