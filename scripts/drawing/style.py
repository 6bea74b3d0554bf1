"""The look that all figures share. Colours are those of Okabe and Ito, which colour-blind readers can tell apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmaps.evaluation.plots import pyplot

ROOT = Path(__file__).resolve().parent.parent.parent
BLUE, ORANGE, GREEN, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#555555", "#BBBBBB"
WIDTH = 7.2  # inches: shown at full size in a column of 700 pixels


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the shared look inside the block."""
    look = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.6,
        "figure.dpi": 170,
        "savefig.dpi": 170,
        "figure.constrained_layout.use": True,
    }
    with pyplot().rc_context(look):
        yield


def panels(count: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure of the column's width and its ``count`` panels in one row."""
    figure, axes = pyplot().subplots(1, count, figsize=(WIDTH, height), **options)
    return figure, axes


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.8) -> None:
    """Draw an arrow between two points of the data's coordinates."""
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    axes.annotate("", xy=end, xytext=start, arrowprops=look, zorder=5)
