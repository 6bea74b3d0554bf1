"""Writing data sets to disk once, in shards, so that a stopped call goes on where it was."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from flowmaps import UserError
from flowmaps.files import sha256, write_file
from training.data.shards import FORMAT, shard_name
from training.processes import processes

Make = Callable[[int], tuple[dict[str, Tensor], list[str]]]  # of a shard: tensors [n, ...], and what was left out


def begin(out: Path, kind: str, facts: dict[str, Any], shards: int) -> list[int]:
    """Begin or go on with the set of ``kind`` that ``facts`` describe; returns which shards this process has to make.

    Refused if ``out`` has another set. A shard whose checksum is known and wrong is made again.
    """
    state = processes()
    card, facts = out / f"{kind}.json", {"format": FORMAT, **facts}
    with state.local_main_process_first():
        out.mkdir(parents=True, exist_ok=True)
        if other := sorted(file.name for file in out.glob("*.json") if file.name not in (card.name, "checksums.json")):
            raise UserError(f"--out={out} has {other[0]}, another kind of set: use a new --out")
        try:
            stored = json.loads(card.read_text()) if card.exists() else facts
            changed = [key for key in facts if stored[key] != facts[key]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{card} is damaged ({error}): use a new --out") from None
        if changed:
            raise UserError(
                f"--out={out} has {kind} of another {changed[0]} ({stored[changed[0]]}, now {facts[changed[0]]}): use "
                "a new --out"
            )
        if state.is_local_main_process:
            write_file(card, json.dumps(facts, indent=1).encode())
            _remove_damaged(out)
    missing = [number for number in range(shards) if not (out / shard_name(number)).is_file()]
    state.wait_for_everyone()  # before any process makes what another one would find
    return missing[state.process_index :: state.num_processes]


def _remove_damaged(out: Path) -> None:
    try:
        known = json.loads((out / "checksums.json").read_text())
        for name, entry in known.items():
            if (out / name).is_file() and sha256(out / name) != entry["sha256"]:
                (out / name).unlink()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none yet, or damaged itself: shards are written in one step, those that are there are whole


def complete(out: Path, shards: int, missing: list[int], make: Make) -> Iterator[tuple[int, int]]:
    """Make the ``missing`` shards, and when all of the set are there its checksums; yields (made, to make)."""
    state = processes()
    yield 0, len(missing)
    for done, number in enumerate(missing, 1):
        tensors, left_out = make(number)
        write_file(out / shard_name(number), save(tensors, {"left_out": json.dumps(left_out)}))
        yield done, len(missing)
    state.wait_for_everyone()
    if state.is_main_process:
        files = [out / shard_name(number) for number in range(shards)]
        write_file(out / "checksums.json", json.dumps({file.name: _known(file) for file in files}, indent=1).encode())


def _known(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as shard:
        rows = shard.get_slice(next(iter(shard.keys()))).get_shape()[0]
        left_out = json.loads(shard.metadata()["left_out"])
    return {"rows": rows, "bytes": file.stat().st_size, "sha256": sha256(file), "left_out": left_out}
