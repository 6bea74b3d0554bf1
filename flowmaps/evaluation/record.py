"""The record of an evaluation: what its numbers depend on, and its rows as a table."""

import platform
import sys
from importlib.metadata import version
from typing import Any

import flowmaps
from flowmaps import FlowMap
from flowmaps.distributed import pick_device
from flowmaps.evaluation.references import Reference
from flowmaps.markdown import markdown_table
from flowmaps.vae import fingerprint

Row = dict[str, Any]
Record = dict[str, Any]


def describe(reference: Reference, fm: FlowMap | None, facts: dict[str, Any]) -> Record:
    """Return the record of an evaluation without its ``results``: every fact that the numbers depend on."""
    model = {} if fm is None else {k: getattr(fm.info, k) for k in ("data", "kind", "ema", "images_seen", "guidance")}
    if fm is not None:
        model |= {"interpolant": fm.interpolant_name, "base_std": fm.base_std}
    if fm is not None and fm.info.latent_scale:
        decoder = fm.open_decoder()
        model["vae"] = {"source": decoder.source, "sha256": fingerprint(decoder.open()), "dtype": str(decoder.dtype)}
    packages = {name: version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")}
    stats, extractor, _ = reference
    return {
        "metric": extractor.metric,
        "extractor": {k: getattr(extractor.origin, k) for k in ("extractor", "weights", "resize")},
        "reference": {k: getattr(stats.origin, k) for k in ("data", "split", "size", "crop", "content", "weights")}
        | {"n": stats.n, "sha256": stats.sha256()},
        "model": model,
        **facts,
        "command": " ".join(sys.argv),
        "device": str(pick_device()),
        "versions": {"flowmaps": flowmaps.__version__, "python": platform.python_version(), **packages},
    }


HIDDEN = {"weights", "times", "spread", "repeats"}  # facts of a row that a table has no room for


def table(results: list[Row]) -> str:
    """Return rows as Markdown, with the columns of the first one; mean ± half the range of repeated scores."""
    columns = [name for name in results[0] if name not in HIDDEN]
    return markdown_table(columns, [[_cell(row, name) for name in columns] for row in results], aligned=True)


def _cell(row: Row, name: str) -> str:
    text = f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
    return f"{text} ± {row['spread'][name]:.2g}" if name in row.get("spread", {}) else text
