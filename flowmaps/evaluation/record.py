"""The record of an evaluation: what its numbers depend on, and its rows as a table."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flowmaps
from flowmaps import FlowMap
from flowmaps.distributed import pick_device
from flowmaps.errors import UserError, shorten
from flowmaps.evaluation.references import Reference
from flowmaps.files import WRITTEN_BY
from flowmaps.labels import BALANCED
from flowmaps.markdown import markdown_table
from flowmaps.metrics.influence import BLOCKS
from flowmaps.reading import parse, read_json
from flowmaps.vae import fingerprint

Row = dict[str, Any]
Record = dict[str, Any]
ROW_KEY = ("ema", "sampler", "grid", "steps")  # what identifies a row


@dataclass(frozen=True)
class _Reference:
    """The schema of a record's ``reference``."""

    data: str
    split: str
    size: str
    crop: str
    content: str
    weights: str
    n: int | None
    sha256: str


@dataclass(frozen=True)
class _Representation:
    """The schema of what a record has for each extractor."""

    metric: str
    extractor: dict[str, str]
    reference: _Reference


@dataclass(frozen=True)
class _Record:
    """The schema of a record in a file."""

    metric: str
    extractor: dict[str, str]
    reference: _Reference
    model: dict[str, Any]
    source: str
    num: int
    seeds: list[int]
    label: int | None
    guidance: float | None
    gamma: float | None
    command: str
    device: str
    versions: dict[str, str]
    results: list[Row]
    guidance_interval: list[float] | None = None
    representations: list[_Representation] = field(default_factory=list)  # of several extractors
    floor: dict[str, Any] | None = None  # source, n and distances of real images
    kid_subset: int | None = None  # of KID, if it was scored
    label_policy: str | None = None  # of an earlier version's record of a model: balanced
    condition: str | None = None  # SHA-256 of the conditions of a model that takes them
    failed: list[str] = field(default_factory=list)  # reasons why the run that wrote it failed its gate
    written_by: str = ""


@dataclass(frozen=True)
class _Row:
    """The schema of a row of ``results`` without its scores; a row of images has only scores."""

    ema: float | None = None
    sampler: str = ""
    grid: str = ""
    steps: int = 0
    nfe: int = 0
    weights: str = ""
    times: list[float] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)
    repeats: list[dict[str, float]] = field(default_factory=list)
    se: dict[str, float] = field(default_factory=dict)  # standard error of a distance by its name
    bias: dict[str, float] = field(default_factory=dict)
    influence: dict[str, list[list[float]]] = field(default_factory=dict)  # of the blocks, a list for each seed


def read_record(file: str | Path) -> Record:
    """Read a record with finite scores that ``fid.py --json`` wrote.

    Raises:
        UserError: The file is missing, damaged or something else; the field is "record".
    """
    try:
        found: Record = read_json(file, "give a file that fid.py --json wrote")
        record = parse(_Record, found, "it")
        keys = [_check_row(row, record, f"results[{i}]") for i, row in enumerate(record.results)]
        if not keys or len(set(keys)) < len(keys):
            raise UserError("results has no rows, or two rows of the same name")
    except UserError as error:
        reason = f"not a record of fid.py --json ({error}): write it again"
        raise UserError(reason, field="record", value=file) from None
    found.pop(WRITTEN_BY, None)
    found.setdefault("label_policy", BALANCED if record.seeds else None)
    return found


def row_facts(row: Row) -> set[str]:
    """Return the keys of a row that are not scores."""
    return row.keys() & {f.name for f in fields(_Row)}


def _check_row(row: Row, record: _Record, where: str) -> tuple[Any, ...]:
    known = row_facts(row)
    facts = parse(_Row, {name: row[name] for name in known}, where)
    scores = parse(dict[str, float], {name: value for name, value in row.items() if name not in known}, where)
    for metric in [record.metric, *(part.metric for part in record.representations)]:
        if not scores.get(metric, -1) >= 0:
            raise UserError(f"{where}: {shorten(metric, 60)} is missing or negative")
    for name, seeds in facts.influence.items():
        if len(seeds) != max(len(record.seeds), 1) or any(len(blocks) != BLOCKS for blocks in seeds):
            raise UserError(f"{where}: influence of {shorten(name, 40)} must have {BLOCKS} numbers for each seed")
    return tuple(getattr(facts, name) for name in ROW_KEY)


def describe(references: Sequence[Reference], fm: FlowMap | None, facts: dict[str, Any]) -> Record:
    """Return the record of an evaluation without its ``results``: every fact that the numbers depend on.

    ``metric``, ``extractor`` and ``reference`` are those of the first representation, ``representations`` lists all if
    there are several.
    """
    model = {} if fm is None else {k: getattr(fm.info, k) for k in ("data", "kind", "ema", "images_seen", "guidance")}
    if fm is not None:
        model |= {"interpolant": fm.interpolant_name, "base_std": fm.base_std}
    if fm is not None and fm.info.latent_scale:
        decoder = fm.open_decoder()
        model["vae"] = {"source": decoder.source, "sha256": fingerprint(decoder.open()), "dtype": str(decoder.dtype)}
    packages = {name: version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")}
    parts = [_representation(reference) for reference in references]
    return {
        **parts[0],
        **({"representations": parts} if len(parts) > 1 else {}),
        "model": model,
        **facts,
        "command": " ".join(sys.argv),
        "device": str(pick_device()),
        "versions": {"flowmaps": flowmaps.__version__, "python": platform.python_version(), **packages},
    }


def _representation(reference: Reference) -> dict[str, Any]:
    stats, extractor, _ = reference
    return {
        "metric": extractor.metric,
        "extractor": {k: getattr(extractor.origin, k) for k in ("extractor", "weights", "resize")},
        "reference": {k: getattr(stats.origin, k) for k in ("data", "split", "size", "crop", "content", "weights")}
        | {"n": stats.n, "sha256": stats.sha256()},
    }


def representations(record: Record) -> list[dict[str, Any]]:
    """Return ``metric``, ``extractor`` and ``reference`` of each extractor of a record."""
    return record.get("representations") or [record]


def ratios(row: Row, record: Record) -> Row:
    """Return the ratio of each distance of ``row`` to that of the record's real images, as far as it is positive."""
    floor = record.get("floor") or {}
    found = {name: row[name] / value for name, value in floor.items() if name in row and value > 0}
    return {f"{name} ratio": value for name, value in found.items()}


HIDDEN = {
    "weights",
    "times",
    "spread",
    "repeats",
    "se",
    "bias",
    "influence",
}  # facts of a row that a table has no room for


def table(results: list[Row]) -> str:
    """Return rows as Markdown, with the first one's columns: score ± half the range over seeds (standard error)."""
    columns = [name for name in results[0] if name not in HIDDEN]
    return markdown_table(columns, [[_cell(row, name) for name in columns] for row in results], aligned=True)


def _cell(row: Row, name: str) -> str:
    text = f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
    text += f" ± {row['spread'][name]:.2g}" if name in row.get("spread", {}) else ""
    return f"{text} ({row['se'][name]:.2g})" if name in row.get("se", {}) else text
