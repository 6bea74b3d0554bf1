"""Writing of prepared sets, in runs that can be resumed and in several processes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flowmaps.data.shard_files import (
    CHECKSUMS,
    FACTS,
    FORMAT,
    MOST_SHARDS,
    Entry,
    complete,
    identity,
    read_checksums,
    read_facts,
    read_header,
    shard_name,
    sign,
)
from flowmaps.distributed import processes
from flowmaps.errors import UserError, blame
from flowmaps.files import Layout, sha256, to_json, write_file, write_json

LARGEST_SHARD = 1 << 34  # bytes, since a shard is made in memory
NEW = "choose a new directory"
MakeShard = Callable[[int], tuple[dict[str, Tensor], list[str]]]  # number -> tensors [n, ...], files left out


@dataclass(frozen=True)
class Writing:
    """A set that is being written to ``out``: ``shards`` in all, of which this process makes the ``missing`` ones."""

    out: Path
    kind: str
    facts: dict[str, Any]
    shards: int
    missing: list[int]


def check_directory(out: Path, kind: str) -> None:
    """Refuse a directory that holds anything but a set of ``kind``, complete or not."""
    with blame("out", out):
        for other in FACTS:
            if other != kind and (out / f"{other}.json").exists():
                raise UserError(f"has {other}.json, another kind of set: {NEW}")
        Layout(f"{kind}.json", b"written_by", (f"{kind}.json", CHECKSUMS, "shard-*.safetensors")).check(out.resolve())


def check_shard(rows: int, each: int) -> None:
    """Refuse shards of ``rows`` items of ``each`` bytes that are too large to be made in memory."""
    if rows * each > LARGEST_SHARD:
        raise UserError(f"makes files of {rows * each:,} bytes, more than {LARGEST_SHARD:,}", "shard", rows)


def start_writing(out: str | Path, kind: str, facts: dict[str, Any], shards: int) -> Writing:
    """Start or resume writing the set of ``kind`` that ``facts`` describe, in ``shards`` files.

    A shard that does not have its checksum is made again, and before the set is complete, one whose pictures have
    changed since it was made.

    Raises:
        UserError: ``out`` holds a different set, or anything else; or pictures of a complete set have changed.
    """
    out, state = Path(out), processes()
    if not 1 <= shards <= MOST_SHARDS:
        raise UserError(f"makes {shards:,} files: choose 1 .. {MOST_SHARDS:,}", field="shard")
    facts = complete(kind, json.loads(to_json({"format": FORMAT, **facts})), kind)
    card = out / f"{kind}.json"
    check_directory(out, kind)
    with blame("out", out):
        stored = read_facts(card, kind, NEW) if card.exists() else facts
        if changed := next((name for name in facts if name != "sources" and stored.get(name) != facts[name]), None):
            raise UserError(f"has {kind} of another {changed} ({stored.get(changed)}, now {facts[changed]}): {NEW}")
        sources = zip_longest(stored.get("sources", []), facts.get("sources", []))
        stale = [number for number, (old, new) in enumerate(sources) if old != new]
        if stale and (out / CHECKSUMS).exists():
            raise UserError(f"has {kind} of pictures that have changed since, in size or time: {NEW}")
    if state.is_local_main_process and (stale or not card.exists()):
        for file in (out / shard_name(number) for number in stale):
            if _intact(file, facts, None):
                file.unlink()
        write_json(card, facts)
    state.wait_for_everyone()  # before a process writes a shard, which another would find without a card
    entries: list[Entry] = []
    if (out / CHECKSUMS).exists():
        with blame("out", out):
            entries = read_checksums(out / CHECKSUMS, f"remove it, or {NEW}")
    known = dict(enumerate(entries))
    mine = range(shards)[state.process_index :: state.num_processes]
    missing = [number for number in mine if not _intact(out / shard_name(number), facts, known.get(number))]
    return Writing(out, kind, facts, shards, missing)


def _intact(file: Path, facts: dict[str, Any], known: Entry | None) -> bool:
    """Return whether a shard is there, of the set that ``facts`` describe, and as it was written."""
    header = read_header(file) if file.is_file() else None
    if header is None or header[0].facts != identity(facts):
        return False
    return known is None or (file.stat().st_size == known.bytes and sha256(file) == known.sha256)


def write_missing(writing: Writing, make: MakeShard) -> Iterator[tuple[int, int]]:
    """Make the missing shards of this process, then the checksums of all; yields (shards made, shards to make).

    Raises:
        UserError: Another command has written to the directory meanwhile.
    """
    state, out = processes(), writing.out
    yield 0, len(writing.missing)
    for done, number in enumerate(writing.missing, 1):
        tensors, left_out = make(number)
        write_file(out / shard_name(number), save(tensors, sign(identity(writing.facts), left_out)))
        yield done, len(writing.missing)
    state.wait_for_everyone()
    if state.is_main_process:
        with blame("out", out):
            card = read_facts(out / f"{writing.kind}.json", writing.kind, NEW)
            files = [out / shard_name(number) for number in range(writing.shards)]
            entries = {file.name: asdict(_entry(file, writing.facts)) for file in files}
            if card != writing.facts:
                raise UserError(f"{OTHER}: {NEW}")
        write_json(out / CHECKSUMS, entries)


OTHER = "another command has written here at the same time"


def _entry(file: Path, facts: dict[str, Any]) -> Entry:
    header = read_header(file)
    if header is None or header[0].facts != identity(facts):
        raise UserError(f"{OTHER} ({file.name}): run this one again")
    return Entry(header[1], file.stat().st_size, sha256(file), header[0].left_out)
