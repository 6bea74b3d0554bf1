"""A one-page HTML report of a comparison: the same noise at several step counts, and distance against steps."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.files import write_file
from flowmaps.images import sample_grid, to_pil, to_uint8
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.extractors import Extractor
from training.evaluation import samples

Result = dict[str, Any]


def compare(
    models: dict[str, FlowMap],
    counts: dict[str, Sequence[int]],
    reference: FeatureStats,
    extractor: Extractor,
    n: int,
    seed: int,
) -> list[Result]:
    """Distance of ``n`` samples of each model at each of its step counts, all from the same noise."""
    results = []
    for name, fm in models.items():
        for count in counts[name]:
            images = to_uint8(samples(fm, count, n, seed))
            distance = frechet_distance(extractor.stats(torch.split(images, 500)), reference)
            results.append({"model": name, "steps": count, extractor.metric: distance})
    return results


def grid_of(models: dict[str, FlowMap], counts: Sequence[int], columns: int, seed: int) -> Image.Image:
    """Rows of the same noise: each model at each step count, its name and steps beside the row."""
    rows: list[Tensor] = []
    names = []
    for name, fm in models.items():
        for count in counts:
            rows.append(samples(fm, count, columns, seed))
            names.append(f"{name}, {count} step{'s' if count > 1 else ''}")
    cells = to_pil(sample_grid(rows, columns))
    margin = 10 + 7 * max(map(len, names))
    picture = Image.new("L", (margin + cells.width, cells.height), 255)
    picture.paste(cells, (margin, 0))
    height = cells.height / len(rows)
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((6, int((i + 0.5) * height) - 6), name, fill=0)
    return picture


def plot(results: Sequence[Result], metric: str, floor: float) -> Image.Image:
    """Distance against number of steps, both logarithmic, with the floor as a dashed line."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'flowmaps[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), dpi=110)
    for name in dict.fromkeys(row["model"] for row in results):
        points = [(row["steps"], row[metric]) for row in results if row["model"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.axhline(floor, color="grey", linestyle="--", label="floor: training images")
    steps = sorted({row["steps"] for row in results})
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel=f"{metric} (lower is better)")
    axes.set_xticks(steps, [str(s) for s in steps])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return Image.open(buffer)


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
  img {{ max-width: 100%; display: block; margin: 1rem 0 }}
  pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{pictures}
<h2>The numbers</h2>
<pre>{numbers}</pre>
<h2>What to type next</h2>
<pre>{commands}</pre>
<details><summary>The config of the run</summary><pre>{config}</pre></details>
</html>
"""


def write_report(out: Path, pictures: dict[str, Image.Image], **texts: str) -> None:
    """Write each picture as a PNG file and ``report.html``, one file with everything inside.

    ``texts``: title, summary, numbers, commands and config.
    """
    images = []
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_file(out / f"{name}.png", buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    escaped = {name: html.escape(text) for name, text in texts.items()}
    write_file(out / "report.html", PAGE.format(pictures="\n".join(images), **escaped).encode())
