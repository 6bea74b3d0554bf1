"""The page of the demo, which compares a flow map with Euler's method: pictures, numbers, conclusions."""

import base64
import html
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from flowmaps import FlowMap
from flowmaps.evaluation.evaluate import evaluate
from flowmaps.evaluation.plots import lines
from flowmaps.evaluation.record import Row
from flowmaps.evaluation.references import Reference
from flowmaps.evaluation.samples import samples
from flowmaps.files import write_file
from flowmaps.images import png, sample_grid, to_pil, write_png
from flowmaps.markdown import counted

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
    needed = f"needs {_steps(enough[:1])}" if enough else f"needs more than {_steps([max(euler)])}"
    said.append(f"To reach what the flow map does in {_steps([first])}, {metric} {jump[first]:.3g}, Euler {needed}.")
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


def plot(results: Sequence[Row], metric: str, floor: float) -> Image.Image:
    """Plot distance against number of steps, both logarithmic, with the floor as a dashed line."""
    return lines([(row["model"], metric, row["steps"], row[metric]) for row in results], floor)


def numbers(results: Sequence[Row], metric: str, floor: float) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the results as text: a row for each step count, a column for each model."""
    scores = {(row["model"], row["steps"]): f"{row[metric]:.3g}" for row in results}
    counts = sorted({steps for _, steps in scores})
    rows = [[str(n), *(scores.get((name, n), "") for name in MODELS)] for n in counts]
    return ["steps", *(f"{name}, {metric}" for name in MODELS)], [*rows, ["floor", f"{floor:.3g}", ""]]


CAPTIONS = {
    "grid": "Real images, and below them the same noise turned into digits: by jumps of the flow map, and by Euler's "
    "method along the drift that flow matching has learned.",
    "distance": "Distance of the samples to held-out digits, against the work for one sample.",
    "loss": "Training loss. The two are different quantities: compare the slopes, not the heights.",
}
PAGE = """\
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
"""
HEAD = """\
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
"""


def write_report(
    out: Path,
    pictures: Mapping[str, Image.Image],
    *,
    title: str,
    summary: str,
    conclusions: Sequence[str],
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]],
    commands: Mapping[str, Sequence[str]],
    config: str,
) -> None:
    """Write each picture as a PNG file and ``report.html``, one file with everything inside.

    Args:
        out: The directory to write to.
        pictures: Those of ``CAPTIONS``.
        title, summary, config: Plain text.
        conclusions: A sentence each.
        numbers: Columns and rows of a table.
        commands: The words of commands to type next, by what they do.
    """
    figures = []
    for name, picture in pictures.items():
        write_png(picture, out / f"{name}.png")
        figures.append(html_figure(picture, CAPTIONS[name]))
    page = PAGE.format(
        pictures="\n".join(figures),
        conclusions="\n".join(f"<li>{html.escape(line)}" for line in conclusions),
        numbers=html_table(*numbers),
        commands="\n".join(f"<p>{html.escape(what)}:</p>{_html_command(words)}" for what, words in commands.items()),
        config=html.escape(config),
    )
    write_file(out / "report.html", html_page(title, summary, page))


def html_page(title: str, summary: str, body: str) -> bytes:
    """Return a page: a title and a summary as plain text, and the rest as HTML."""
    head = HEAD.format(title=html.escape(title), summary=html.escape(summary))
    return f"{head}{body}</html>\n".encode()


def html_figure(picture: Image.Image, caption: str) -> str:
    """Return a picture inside the page, with its caption below."""
    source, text = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}", html.escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    lines = []
    for cells, tag in ((columns, "th"), *((row, "td") for row in rows)):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _html_command(words: Sequence[str]) -> str:
    """Return a command with a flag in each line, which a shell takes as it is."""
    text = shlex.join(words).replace(" --", " \\\n    --")
    return f"<pre>{html.escape(text)}</pre>"
