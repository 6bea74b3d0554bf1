"""Files of records that benchmark.py writes and resumes from, and records as a table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import best_rates
from flowmaps import UserError
from flowmaps.errors import blame
from flowmaps.files import lock_later, write_json
from flowmaps.markdown import markdown_table
from flowmaps.reading import parse, read_json


def stored_records(file: str, suite: str, budget: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of an earlier call with the same suite and budget; none if the file does not exist yet."""
    if not Path(file).exists() or not Path(file).stat().st_size:
        return []
    with blame("json", file):
        stored = read_records(file)
        if (stored.suite, stored.budget) != (suite, budget):
            raise UserError("has records of another suite or budget: choose another file")
    return stored.records


def read_records(file: str | Path) -> "Stored":
    """Return the content of a file of records; a score that is null there, which was not finite, is NaN."""
    stored = parse(Stored, read_json(file, "choose another file"), str(file))
    for i, record in enumerate(stored.records):
        facts = parse(_Facts, {name: record.get(name) for name in ("row", "seed", "scores")}, f"records[{i}]")
        record["scores"] = {name: math.nan if value is None else value for name, value in facts.scores.items()}
    return stored


@dataclass(frozen=True)
class Stored:
    """The schema of a file of records."""

    suite: str
    budget: dict[str, float | None]
    records: list[dict[str, Any]]
    written_by: str = ""


@dataclass(frozen=True)
class _Facts:
    """The fields that every record has; the others depend on the suite."""

    row: str
    seed: int
    scores: dict[str, float | None]


def add_record(file: str, suite: str, budget: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Add ``record`` to a file, whatever other processes add to it meanwhile, and return all that it now has."""
    with lock_later(Path(file).parent) as lock:
        lock()
        stored, mine = stored_records(file, suite, budget), (record["row"], record["seed"])
        records = [*(r for r in stored if (r["row"], r["seed"]) != mine), record]
        write_json(Path(file), {"suite": suite, "budget": budget, "records": records})
    return records


# Boffi et al. 2025, table 1: another network and budget (MLP 4 x 512, 150,000 steps of 100,000 points), and a KL whose
# definition is not published.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "checkerboard": {
        row: {f"KL@{n}": kl for n, kl in zip((1, 2, 4, 8, 16), kls, strict=True)}
        for row, kls in {
            "lagrangian": (0.086, 0.077, 0.071, 0.070, 0.071),
            "eulerian": (0.098, 0.092, 0.083, 0.082, 0.075),
            "progressive": (0.146, 0.089, 0.081, 0.072, 0.069),
            "progressive_uniform": (0.111, 0.107, 0.075, 0.073, 0.068),
        }.items()
    }
}


def markdown(records: list[dict[str, Any]], suite: str = "", shown: Sequence[str] = ()) -> str:
    """Return a Markdown table: mean over seeds and half the range of every score, and the paper's numbers.

    Only of the metrics ``shown`` if there are any, and of the rows that have them; of optimisers only at their best
    rates.
    """
    records = best_rates(records) if suite == "optimisers" else records
    found = list(dict.fromkeys(name for record in records for name in record["scores"]))
    metrics = shown or list(dict.fromkeys(name.partition("@")[0] for name in found))
    found = [name for name in found if name.partition("@")[0] in metrics]
    names = sorted(found, key=lambda name: metrics.index(name.partition("@")[0]))
    facts = [key for key in records[0] if isinstance(records[0][key], (int, float)) and key != "seed"]
    table = []
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        cells = [row, *(_mean([r[key] for r in mine]) for key in facts)]
        for name in names:
            values = [r["scores"][name] for r in mine if name in r["scores"]]
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        if not any(cells[1 + len(facts) :]):
            continue
        table.append(cells)
        published = [str(PAPER.get(suite, {}).get(row, {}).get(name, "")) for name in names]
        if any(published):
            table.append([f"{row}, paper", *[""] * len(facts), *published])
    return markdown_table(["", *(key.replace("_", " ").replace("cpu", "CPU") for key in facts), *names], table)


def _mean(values: Sequence[float]) -> str:
    """Return a count without decimals, and another number to four digits."""
    counts = all(isinstance(value, int) for value in values)
    return f"{statistics.mean(values):,.0f}" if counts else f"{statistics.mean(values):.4g}"
