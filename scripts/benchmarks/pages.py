"""Tables of results in Markdown pages, written from the records in assets/."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record_files import Stored, markdown, read_records
from flowmaps import UserError
from flowmaps.markdown import counted, markdown_table
from flowmaps.model_card import result_tables

MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
CHECKPOINTS = {"fashion_mnist": "Fashion-MNIST", "digits": "Digits", "emoji": "Emoji", "checkerboard": "Checkerboard"}
SHOWN = (1, 2, 4, 8, 64)  # steps, in the short table


class Section(NamedTuple):
    """The records of a benchmark on the page: a title, and the metrics that each table shows, or all in one."""

    title: str
    tables: Sequence[Sequence[str]] = ((),)


IMAGES = (("map", "euler"), ("stochastic",))
SECTIONS = {  # name of the file in assets/
    "checkerboard.json": Section("Points of the checkerboard", (("KL",), ("W2",))),
    "digits_objectives.json": Section("Digits", IMAGES),
    "digits_imf.json": Section("Improved MeanFlow on digits", IMAGES),
    "fashion_imf.json": Section("Improved MeanFlow on garments", IMAGES),
    "pixels.json": Section("Prediction of pixels"),
    "segments.json": Section("Where on its path the garments' flow errs"),
    "composition-digits.json": Section("Compositions on digits", IMAGES),
    "composition-fashion_mnist.json": Section("Compositions on garments", IMAGES),
}


def with_tables(text: str, assets: Path) -> str:
    """Return a page with the table between each pair of comments written anew from the records in ``assets``."""
    return MARKED.sub(lambda found: f"{found[1]}{_padded(_table(found[2], assets))}{found[3]}", text)


def _padded(table: str) -> str:
    return f"\n{table}\n\n" if table else ""


def _table(name: str, assets: Path) -> str:
    if name == "checkpoints":
        return short_table(assets)
    if name in CHECKPOINTS:
        return checkpoint_table(name, assets)
    if name not in SECTIONS:
        raise UserError(f"results: {name}: choose from {', '.join(['checkpoints', *CHECKPOINTS, *SECTIONS])}")
    return benchmark_section(name, assets) if (assets / name).exists() else ""


def _records(name: str, assets: Path) -> list[dict[str, Any]]:
    files = [assets / "results" / f"{name}-{way}.json" for way in ("map", "stochastic", "stored", "euler")]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _scores(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], float]:
    """Return the distance by (sampler, grid, steps)."""
    return {(row["sampler"], row["grid"], row["steps"]): row[r["metric"]] for r in records for row in r["results"]}


def short_table(assets: Path) -> str:
    """Return two rows for each checkpoint: its map, and Euler's method on its drift, on the step sizes by default."""
    rows = []
    for name, title in CHECKPOINTS.items():
        records = _records(name, assets)
        scores = _scores(records)
        for sampler, label in (("map", f"{title}, {records[0]['metric']}"), ("euler", "Euler's method on its drift")):
            found = [scores.get((sampler, "stored", n), scores.get((sampler, "uniform", n))) for n in SHOWN]
            rows.append([label, *("" if score is None else f"{score:.3g}" for score in found)])
    return markdown_table(["steps", *map(str, SHOWN)], rows)


def checkpoint_table(name: str, assets: Path) -> str:
    """Return the table of a model card below its commands, and the map's distance relative to 64 Euler steps."""
    records = _records(name, assets)
    scores, [table] = _scores(records), result_tables(records, f"assets/{name}")
    ratios = [scores["map", "uniform", n] / scores["euler", "uniform", 64] for n in (1, 4)]
    seeds = len(records[0]["seeds"])
    mean = f", mean of {seeds} seeds" if seeds > 1 else ""
    return (
        f"**{CHECKPOINTS[name]}**{mean}; in one step "
        f"{ratios[0]:.2f} times the distance of 64 Euler steps on the same network's drift, in four {ratios[1]:.2f} "
        f"times.\n{table}{_honesty(records)}"
    )


def _honesty(records: Sequence[dict[str, Any]]) -> str:
    """Return a paragraph with the distances extrapolated to infinitely many samples, and what they are measured by."""
    metric, first = records[0]["metric"], records[0]
    rows = [row for r in records for row in r["results"] if row["grid"] == "uniform" and "bias" in row]
    if not rows:
        return ""
    found = {(row["sampler"], row["steps"]): f"{row[metric] - row['bias'][metric]:.3g}" for row in rows}
    parts = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        counts = [str(steps) for of, steps in found if of == sampler]
        values = [value for (of, _), value in found.items() if of == sampler]
        parts.append(f"`{sampler}` {' / '.join(values)} in {' / '.join(counts)} steps")
    return (
        f"\n\nExtrapolated to infinitely many samples, i.e. less the bias that the jackknife estimates: "
        f"{'; '.join(parts)}. SHA-256 of the extractor's weights {first['extractor']['weights'][:16]}, of the "
        f"reference's statistics {first['reference']['sha256'][:16]}."
    )


def benchmark_section(name: str, assets: Path) -> str:
    """Return the title, the command, the machine and the tables of a file of records of benchmark.py."""
    stored, section = read_records(assets / name), SECTIONS[name]
    suite, records = stored.suite, stored.records
    found = {score.partition("@")[0] for record in records for score in record["scores"]}
    tables = [markdown(records, suite, shown) for shown in section.tables if not shown or found & {*shown}]
    parts = [f"### {section.title}", f"    {command(name, stored, assets)}", _origin(records), *tables]
    return "\n\n".join(parts)


def command(name: str, stored: Stored, assets: Path) -> str:
    """Return the command of benchmark.py that writes the records in the file ``name``."""
    records, plot = stored.records, (assets / name).with_suffix(".png")
    names, parts = list(dict.fromkeys(record["row"] for record in records)), dict[str, Any]()
    parts["suite"] = stored.suite
    if stored.suite == "learning":  # "lagrangian, lr 0.001"
        parts["rates"] = ",".join(dict.fromkeys(name.partition(", lr ")[2] for name in names))
    parts["rows"] = ",".join(dict.fromkeys(name.partition(", ")[0] for name in names))
    parts["seeds"] = ",".join(map(str, sorted({record["seed"] for record in records})))
    parts |= {key: f"{value:.9g}" for key, value in stored.budget.items() if value is not None}
    parts["threads"] = records[0]["machine"]["threads"]
    parts["json"] = f"assets/{name}"
    parts |= {"plot": f"assets/{plot.name}"} if plot.exists() else {}
    return shlex.join(["python", "scripts/benchmark.py", *(f"--{key}={value}" for key, value in parts.items())])


def _origin(records: Sequence[dict[str, Any]]) -> str:
    """Return a sentence on the seeds and the machines of the records."""
    seeds, found = {record["seed"] for record in records}, list[str]()
    for machine in (record["machine"] for record in records):
        where = f"{machine['processor']}, " if "processor" in machine else ""
        found.append(f"{where}{counted(machine['threads'], 'thread')}, torch {machine['torch'].partition('+')[0]}")
    mean = f"Mean of {len(seeds)} seeds ± half the range" if len(seeds) > 1 else "One seed"
    return f"{mean}; {'; '.join(dict.fromkeys(found))}."
