"""Plots, and a one-page HTML report that compares models: the same noise and the distance at several step counts."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.evaluation.evaluate import evaluate
from flowmaps.evaluation.record import Row
from flowmaps.evaluation.references import Reference
from flowmaps.evaluation.samples import samples
from flowmaps.files import write_file
from flowmaps.images import png, sample_grid, to_pil, write_png
from flowmaps.markdown import counted
from flowmaps.step_sizes import FittedSchedule
from samplers import uniform_times

MODELS = ("flow map", "Euler")  # of the demo


def compare(
    models: Mapping[str, FlowMap], counts: Mapping[str, Sequence[int]], reference: Reference, num: int, seed: int
) -> list[Row]:
    """Score ``num`` samples of each model at each of its step counts, all from the same noise, in uniform steps."""
    results = []
    for name, fm in models.items():
        record = evaluate(fm, reference, steps=counts[name], num=num, seeds=(seed,), schedule="uniform")
        metric = record["metric"]
        results += [{"model": name, "steps": row["steps"], metric: row[metric]} for row in record["results"]]
    return results


EVEN = 0.05  # relative difference of two distances that counts as none: another seed changes them by as much


def conclusions(results: Sequence[Row], metric: str, floor: float, drift_share: float) -> list[str]:
    """Return sentences on where the flow map and where Euler's method is ahead, and why.

    Args:
        results: Rows of ``compare``, of the models "flow map" and "Euler".
        metric: Name of the distance in them.
        floor: The distance of the training images themselves.
        drift_share: Share of its training rows that teach the flow map the drift.
    """
    found = {name: {row["steps"]: row[metric] for row in results if row["model"] == name} for name in MODELS}
    jump, euler = (found[name] for name in MODELS)
    both = [n for n in jump if n in euler]
    even = [n for n in both if abs(jump[n] - euler[n]) <= EVEN * max(jump[n], euler[n])]
    ahead = {
        MODELS[0]: [n for n in both if n not in even and jump[n] < euler[n]],
        MODELS[1]: [n for n in both if n not in even and jump[n] > euler[n]],
    }
    said = []
    for (name, counts), other in zip(ahead.items(), (euler, jump), strict=True):
        if counts:
            pairs = _listed([f"{found[name][n]:.3g} against {other[n]:.3g}" for n in counts])
            said.append(f"In {_steps(counts)} {_the(name)} is ahead: {metric} {pairs} (lower is better).")
    if even:
        said.append(f"In {_steps(even)} the two are even, within {EVEN:.0%}.")
    if ahead[MODELS[1]]:
        said.append(
            "Euler's error shrinks as its steps get smaller, and then the drift itself decides. Flow matching learns "
            f"it from all of its training rows, the flow map from {drift_share:.0%} of its: the rest teach jumps."
        )
    first, enough = min(jump), [n for n in sorted(euler) if euler[n] <= jump[min(jump)]]
    needed = f"needs {_steps(enough[:1])}" if enough else f"does not get there in {_steps([max(euler)])}"
    said.append(f"For what the flow map reaches in {_steps([first])}, {metric} {jump[first]:.3g}, Euler {needed}.")
    best = min(results, key=lambda row: float(row[metric]))
    said.append(
        f"The best of all, {_the(best['model'])} in {_steps([best['steps']])}, is at {best[metric]:.3g}. "
        f"Training images themselves are at {floor:.3g}: no model can be expected to do better."
    )
    return said


def _the(name: str) -> str:
    return "the flow map" if name == MODELS[0] else name


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _steps(counts: Sequence[int]) -> str:
    return f"{_listed([str(n) for n in counts])} step{'s' * (list(counts) != [1])}"


def grid_of(
    models: dict[str, FlowMap], counts: Sequence[int], columns: int, seed: int, real: Tensor | None = None
) -> Image.Image:
    """Draw rows of the same noise: each model at each step count, labelled with its name and steps.

    ``real`` are images in [-1, 1] for a row above.
    """
    rows: list[Tensor] = [] if real is None else [real]
    names = [] if real is None else ["real images"]
    for name, fm in models.items():
        for count in counts:
            rows.append(samples(fm, count, columns, seed))
            names.append(f"{name}, {counted(count, 'step')}")
    cells = to_pil(sample_grid(rows, columns))
    margin = 10 + 7 * max(map(len, names))
    picture = Image.new("L", (margin + cells.width, cells.height), 255)
    picture.paste(cells, (margin, 0))
    height = cells.height / len(rows)
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((6, int((i + 0.5) * height) - 6), name, fill=0)
    return picture


MARKERS = "osD^v<>PX*"
EVALUATIONS = "network evaluations per sample"


def plot(results: Sequence[Row], metric: str, floor: float) -> Image.Image:
    """Plot distance against number of steps, both logarithmic, with the floor as a dashed line."""
    return lines([(row["model"], metric, row["steps"], row[metric]) for row in results], floor)


def pyplot() -> Any:
    """Import matplotlib's pyplot, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'flowmaps[demo]'") from None
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
    styles = {name: {"color": f"C{i}", "fmt": f"{MARKERS[i % len(MARKERS)]}-"} for i, name in enumerate(names)}
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
        if len(steps) <= 8:
            axes.set_xticks(steps, [str(s) for s in steps])
            axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(plt.NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=min(4, len(shown)), fontsize="small")
    return picture(figure)


def step_sizes(fitted: FittedSchedule) -> Image.Image:
    """Plot the times of each grid next to equal steps, and the matrix of costs with the grids' jumps in it."""
    schedule, cost = fitted
    figure, (left, right) = pyplot().subplots(1, 2, layout="constrained", figsize=(12, 4.5), dpi=110)
    for row, (steps, times) in enumerate(schedule.items()):
        left.plot(uniform_times(steps), [row - 0.15] * (steps + 1), "|", color="grey", markersize=9)
        left.plot(times, [row + 0.1] * (steps + 1), "|", color=f"C{row}", markersize=14, markeredgewidth=2)
        index = (times * schedule.fine).round()
        right.plot(index[1:], index[:-1], "o", color=f"C{row}", markersize=5, label=f"{steps} steps")
    left.set_yticks(range(len(schedule)), [f"{steps} steps" for steps in schedule])
    left.set(xlabel="time (0 noise, 1 data); grey: equal steps", ylim=(-0.6, len(schedule) - 0.4))
    drawn = right.imshow(cost.where(cost > 0, torch.nan).log10(), cmap="viridis")
    figure.colorbar(drawn, ax=right, label=f"log10 of the cost: {schedule.cost}")
    right.set(xlabel=f"to time (of {schedule.fine})", ylabel="from time")
    right.legend(fontsize="small", loc="lower left")
    return picture(figure)


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="generator" content="written_by: flowmaps">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
  figure {{ margin: 1.5rem 0 }}
  figcaption {{ color: #555 }}
  img {{ max-width: 100%; display: block }}
  table {{ border-collapse: collapse }}
  th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #ccc; text-align: right }}
  pre {{ background: #f4f4f4; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<h2>What it shows</h2>
<ul>
{conclusions}
</ul>
{pictures}
<h2>The numbers</h2>
{numbers}
<h2>What to type next</h2>
{commands}
<details><summary>The config of the run</summary><pre>{config}</pre></details>
</html>
"""


def write_report(
    out: Path,
    pictures: Mapping[str, tuple[Image.Image, str]],
    *,
    title: str,
    summary: str,
    conclusions: Sequence[str],
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]],
    commands: Mapping[str, str],
    config: str,
) -> None:
    """Write each picture as a PNG file and ``report.html``, one file with everything inside.

    Args:
        out: The directory to write to.
        pictures: A picture and its caption, by the name of its file.
        title, summary, config: Plain text.
        conclusions: A sentence each.
        numbers: Columns and rows of a table.
        commands: Commands to type next, by what they do.
    """
    figures = []
    for name, (picture, caption) in pictures.items():
        write_png(picture, out / f"{name}.png")
        source, text = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}", html.escape(caption)
        figures.append(f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    page = PAGE.format(
        pictures="\n".join(figures),
        conclusions="\n".join(f"<li>{html.escape(line)}" for line in conclusions),
        numbers=_html_table(*numbers),
        commands="\n".join(f"<p>{html.escape(k)}:</p><pre>{html.escape(v)}</pre>" for k, v in commands.items()),
        **{name: html.escape(text) for name, text in (("title", title), ("summary", summary), ("config", config))},
    )
    write_file(out / "report.html", page.encode())


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells, tag in ((columns, "th"), *((row, "td") for row in rows)):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
