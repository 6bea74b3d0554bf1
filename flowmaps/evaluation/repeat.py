"""Repeat the evaluation of a record: the flags that it was made with, and where a new record differs."""

import math
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from flowmaps.data.registry import DATASETS
from flowmaps.errors import UserError
from flowmaps.evaluation.record import ROW_KEY, Record, Row, representations, row_facts, table
from flowmaps.files import write_json
from flowmaps.labels import BALANCED
from flowmaps.markdown import counted
from flowmaps.metrics.extractors import EXTRACTORS
from flowmaps.metrics.scores import KID_SUBSET

AGREE = 1e-6  # relative difference of equal numbers
REPORTED = {"kid": "KID", "is": "IS", "prc": "precision", "cmmd": "CMMD"}  # metrics by a score that they report
PASSING = {"command", "source", "results", "failed", "metric"}  # of a record, what no number depends on
COMPUTED = {"spread", "repeats", "se", "bias", "influence"}  # of a row, what follows with its scores


def flags_of(record: Record) -> dict[str, str]:
    """Return the flags of ``fid.py``, as they are typed, that repeat the evaluation of ``record``.

    Flags that a record cannot know are left out: a reference that is not a data set by name, the file of an extractor
    or of labels.

    Raises:
        UserError: The record's time grid is known to Python alone.
    """
    rows, reference = record["results"], record["reference"]
    given: dict[str, Any] = {"metrics": ",".join(_metrics(record))}
    if reference["data"] in DATASETS:
        given["reference"] = f"{reference['data']}:{reference['split']}"
    names = [part["extractor"]["extractor"] for part in representations(record)]
    if all(name in EXTRACTORS for name in names):
        given["extractors"] = ",".join(names)
    if floor := record.get("floor"):
        given["floor"] = floor["source"]
    if "kid" in given["metrics"].split(","):
        given["kid_subset"] = record.get("kid_subset") or KID_SUBSET
    if "memorisation_ratio" in rows[0]:
        given["memorisation"] = "true"
    if not record["seeds"]:
        return {"samples": record["source"], **{name: str(value) for name, value in given.items()}}
    given |= {"checkpoint": record["source"], "num": record["num"], "seed": record["seeds"][0]}
    given["repeats"] = len(record["seeds"])
    for flag, key in (("sampler", "sampler"), ("schedule", "grid"), ("steps", "steps")):
        given[flag] = ",".join(dict.fromkeys(str(row[key]) for row in rows))
    grids = set(given["schedule"].split(","))
    if "given" in grids:
        raise UserError("its time grid is not a file: repeat it from Python")
    if grids == {"stored", "uniform"} and len({(row["ema"], row["sampler"], row["steps"]) for row in rows}) == len(
        rows
    ):
        given["schedule"] = "stored"  # which is uniform for a step count that has none
    averages = list(dict.fromkeys(row["ema"] for row in rows))
    if averages != [record["model"].get("ema")]:
        given["ema"] = ",".join("raw" if ema is None else str(ema) for ema in averages)
    given |= {key: record[key] for key in ("label", "guidance", "gamma") if record[key] is not None}
    if interval := record.get("guidance_interval"):
        given["guidance_interval"] = ",".join(map(str, interval))
    policy = record["label_policy"] or BALANCED
    if not policy.startswith("sha256:"):
        given["label_policy"] = policy
    if vae := record["model"].get("vae"):
        given |= {"vae": vae["source"], "vae_dtype": vae["dtype"].removeprefix("torch.")}
    return {name: str(value) for name, value in given.items()}


def _metrics(record: Record) -> list[str]:
    """Return the metrics whose scores the rows have."""
    distance = "kl" if record["metric"] == "KL" else "fid"
    return [distance, *(name for name, score in REPORTED.items() if score in record["results"][0])]


def differences(before: Record, now: Record) -> tuple[list[str], list[str]]:
    """Return a line for each score of ``before`` that ``now`` does not repeat, and one for each fact that differs.

    Facts are versions, the device, the hashes of the model's weights, the extractor and the reference, and so on.
    """
    numbers, facts = [], list(_differing(before, now, PASSING))
    if (content := before["reference"]["content"]) and content == now["reference"]["content"]:
        facts = [line for line in facts if not line.startswith("reference.sha256 ")]  # of moments, which round
    rows = {_key(row): row for row in now["results"]}
    for old in before["results"]:
        new, known = rows.get(_key(old), {}), row_facts(old)
        name = ", ".join(str(value) for value in _key(old) if value) or "the samples"
        if not new:
            numbers.append(f"{name}: not scored now")
            continue
        for score, value in ((key, value) for key, value in old.items() if key not in known):
            again = new.get(score, math.nan)
            if not math.isclose(value, again, rel_tol=AGREE, abs_tol=1e-12):
                numbers.append(f"{name}: {score} {value!r} in the record, now {again!r}")
        facts += [f"{name}: {line}" for line in _differing({key: old[key] for key in known}, new, COMPUTED)]
    return numbers, facts


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ROW_KEY)


def _differing(
    before: Mapping[str, Any], now: Mapping[str, Any], skipped: Set[str] = frozenset(), where: str = ""
) -> Iterator[str]:
    """Yield a line for each entry that both mappings have, at any depth, and that differs."""
    for key in (key for key in before if key in now and key not in skipped):
        old, new = before[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, where=f"{where}{key}.")
        elif old != new:
            yield f"{where}{key} {old} in the record, now {new}"


def finish(before: Record, now: Record, name: str, json_file: str | None) -> int:
    """Print the results and where they differ from the record ``name``, write ``json_file``; 1 if a number differs."""
    numbers, facts = differences(before, now)
    if json_file:
        write_json(Path(json_file), now)
    print(table(now["results"]))
    for line in (*numbers, *facts):
        print(f"differs: {line}")
    if numbers:
        count = counted(len(numbers), "difference")
        print(f"{name} is not repeated: {count} above {AGREE:g}", file=sys.stderr)
        return 1
    print(f"{name} is repeated: all numbers agree to {AGREE:g}")
    return 0
