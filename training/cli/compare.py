"""Compare runs on one page: learning curves, scores, samples side by side, and what their configs differ in.

python scripts/compare.py runs/lagrangian runs/eulerian --out=compare.html
python scripts/compare.py runs/seeds --out=seeds.html

A directory of runs, such as train.py --seeds or a chain writes, stands for the runs in it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, write_file

if TYPE_CHECKING:
    from PIL import Image

OUT = flags.DEFINE_string("out", "compare.html", "Page to write, with all pictures in it")
ARGUMENTS = "RUN ..."  # directories of runs
WRITES = (OUT,)
FIRST, LAST = ("loss", "diagonal", "off_diagonal"), ("grad_norm", "lr", "images_per_second")  # in the order of panels
COUNTS = ("skipped", "spikes", "clipped", "jvp_norm")  # drawn only if some run has other values than zero
MOST_FIELDS, MOST_RUNS = 20, 40
WIDTH = 470  # pixels of a grid of samples on the page


class Run(NamedTuple):
    """A run, as far as the page needs it."""

    name: str
    config: dict[str, Any]  # by dotted names
    series: dict[str, list[tuple[int, float]]]  # (step, value) by quantity
    samples: dict[int, Path]  # grids by step


def main(*places: str) -> None:
    out = Path(OUT.value)
    with blame("out", out):
        check_new_file(out)
    if not places:
        raise UserError("name the directories of runs, such as runs/a runs/b")

    from flowmaps.evaluation import plots
    from flowmaps.evaluation.report import html_figure, html_page, html_table

    folders = {name: folder for place in places for name, folder in runs_in(Path(place)).items()}
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs, more than the {MOST_RUNS} that a page can show: name fewer")
    above = os.path.commonpath([folder.parent for folder in folders.values()]) if len(folders) > 1 else ""
    runs = [read(os.path.relpath(name, above) if above else name, folder) for name, folder in folders.items()]
    empty = [run.name for run in runs if not run.series]
    if runs := [run for run in runs if run.series]:
        curves = plots.curves({quantity: lines(runs, quantity) for quantity in quantities(runs)})
    else:
        raise UserError(f"nothing is logged yet in {', '.join(empty)}: wait for the first interval")
    body = [html_figure(curves, "Means over intervals of the log, and scores, by training step.")]
    if any(run.samples for run in runs):
        step, picture = side_by_side(runs)
        caption = "Grids of the runs, as in their samples/."
        body.append(f"<h2>Samples {step}</h2>\n" + html_figure(picture, caption))
    body.append("<h2>The runs</h2>\n" + html_table(*summary(runs)))
    columns, rows = differing(runs)
    if rows:
        body.append("<h2>What differs in the configs</h2>\n" + html_table(columns, rows))
    said = f"{len(runs)} runs" + (f"; nothing is logged yet in {', '.join(empty)}" if empty else "")
    write_file(out, html_page("flowmaps: runs compared", f"{said}.", "\n".join(body)))
    print(f"wrote    {out}: {said}")


def runs_in(place: Path) -> dict[str, Path]:
    """Return the run in ``place``, or the runs in its directories, by the names that the page calls them."""
    if (place / "log.jsonl").is_file():
        return {str(place): place}
    found = sorted(file.parent for file in place.glob("*/log.jsonl")) if place.is_dir() else []
    if not found:
        raise UserError(f"{place} is not a run, nor a directory of runs: it has no log.jsonl")
    return {str(folder): folder for folder in found}


def read(name: str, folder: Path) -> Run:
    """Read config, log and the names of the grids of a run."""
    from training.log import read_log
    from training.loop import named
    from training.run_directory import read_config

    config = read_config(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in ("origin", "written_by")}
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_log(folder / "log.jsonl"):
        for key, value in row.items():
            if key != "step" and "event" not in row and isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, []).append((int(row["step"]), float(value)))
    grids = sorted((folder / "samples").glob("step-*.png"))
    samples = {int(file.stem.partition("-")[2]): file for file in grids if file.stem.partition("-")[2].isdecimal()}
    return Run(name, named(config), series, samples)


def quantities(runs: list[Run]) -> list[str]:
    """Return what is drawn, in order: the loss and its terms, scores, and then the state of the optimiser."""
    found = list(dict.fromkeys(key for run in runs for key in run.series))
    still = {key for key in COUNTS if not any(value for run in runs for _, value in run.series.get(key, ()))}
    middle = sorted((key for key in found if key not in (*FIRST, *LAST)), key=lambda key: ("@" not in key, key))
    return [key for key in (*FIRST, *middle, *LAST) if key in found and key not in still]


def lines(runs: list[Run], quantity: str) -> dict[str, list[tuple[int, float]]]:
    return {run.name: run.series[quantity] for run in runs if quantity in run.series}


def side_by_side(runs: list[Run]) -> tuple[str, "Image.Image"]:
    """Return the grids of all runs, two in a row, at the last step that all have; else the last of each."""
    from PIL import Image, ImageDraw

    shown = [run for run in runs if run.samples]
    common = set.intersection(*(set(run.samples) for run in shown))
    chosen = [(run, max(common) if common else max(run.samples)) for run in shown]
    pictures = []
    for run, step in chosen:
        grid = Image.open(run.samples[step]).convert("RGB")
        if grid.width > WIDTH:
            grid = grid.resize((WIDTH, round(grid.height * WIDTH / grid.width)), Image.Resampling.BOX)
        else:
            scale = WIDTH // grid.width
            grid = grid.resize((scale * grid.width, scale * grid.height), Image.Resampling.NEAREST)
        text = run.name if common else f"{run.name}, step {step:,}"
        picture = Image.new("RGB", (WIDTH, grid.height + 22), "white")
        picture.paste(grid, (0, 22))
        ImageDraw.Draw(picture).text((4, 4), text, fill="black")
        pictures.append(picture)
    width, height = WIDTH + 12, 12 + max(picture.height for picture in pictures)
    page = Image.new("RGB", (width * min(2, len(pictures)), height * -(-len(pictures) // 2)), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (width * (i % 2), height * (i // 2)))
    return (f"after {max(common):,} steps" if common else "of the last grids"), page


def summary(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: steps, the last loss, the best of each score and its step, and the speed."""
    scores = [key for key in quantities(runs) if "@" in key]
    columns = ["run", "steps", "last loss", *(f"best {key}" for key in scores), "images/s"]
    rows = []
    for run in runs:
        best = [min(run.series[key], key=lambda point: point[1]) if key in run.series else None for key in scores]
        cells = (
            [f"{run.series['loss'][-1][0]:,}", f"{run.series['loss'][-1][1]:.4g}"] if "loss" in run.series else ["", ""]
        )
        rate = run.series.get("images_per_second", [])
        rows.append(
            [
                run.name,
                *cells,
                *("" if point is None else f"{point[1]:.4g} at {point[0]:,}" for point in best),
                f"{sum(value for _, value in rate) / len(rate):,.0f}" if rate else "",
            ]
        )
    return columns, rows


def differing(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the fields of the config in which the runs differ."""
    fields = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [[field, *(str(run.config.get(field, "")) for run in runs)] for field in fields]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    more = [[f"and {len(rows) - MOST_FIELDS} more", *[""] * len(runs)]] if len(rows) > MOST_FIELDS else []
    return ["field", *(run.name for run in runs)], rows[:MOST_FIELDS] + more
