"""The files of a prepared set, and what is known about their contents.

KIND.json                 facts about the set; KIND is trajectories, images or latents
shard-00000.safetensors   tensors [n, ...], the same names in all shards of a set
checksums.json            rows, size and SHA-256 of each shard, written last: without it the set is not complete
"""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flowmaps.errors import UserError
from flowmaps.files import WRITTEN_BY, cache_directory, sha256
from flowmaps.info import LARGEST_SAMPLE, MOST_CLASSES, VAE_RANGE
from flowmaps.reading import parse, parse_json, read_json

FORMAT = 4
CHECKSUMS = "checksums.json"
MOST_SHARDS = 100_000


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The content of KIND.json."""

    format: int
    shape: tuple[int, ...]  # of a sample
    num_classes: int = 0
    num: int = 0  # samples before any is left out
    shard: int = 0  # samples per file
    written_by: str = ""

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1 or math.prod(self.shape) > LARGEST_SAMPLE:
            raise UserError(
                f"shape is {list(self.shape)}, expected sizes of at least 1 and together {LARGEST_SAMPLE:,}"
            )
        if not 0 <= self.num_classes <= MOST_CLASSES:
            raise UserError(f"num_classes is {self.num_classes}, expected 0 .. {MOST_CLASSES:,}")


@dataclass(frozen=True, kw_only=True)
class ImageFacts(Facts):
    classes: list[str] = field(default_factory=list)  # their names by number
    crop: str = "none"
    files: str = ""  # SHA-256 over names and labels of the pictures
    sources: list[str] = field(default_factory=list)  # by shard, SHA-256 over their sizes and times

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and len(self.classes) != self.num_classes:
            raise UserError(f"classes has {len(self.classes):,} names for num_classes {self.num_classes:,}")


@dataclass(frozen=True, kw_only=True)
class LatentFacts(ImageFacts):
    latent_shift: list[float]
    latent_scale: list[float]
    vae: str = ""
    vae_sha256: str = ""
    vae_range: tuple[float, float] = VAE_RANGE  # values of black and white for the VAE
    image_size: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent_shift", "latent_scale"):
            if len(getattr(self, name)) != self.shape[0]:
                raise UserError(f"{name} has {len(getattr(self, name))} numbers for {self.shape[0]} channels")
        if 0 in self.latent_scale:
            raise UserError("latent_scale has a 0")


@dataclass(frozen=True, kw_only=True)
class TrajectoryFacts(Facts):
    times: list[float]
    interpolant: str
    base_std: float
    teacher: str
    made: dict[str, Any]
    guidance: float | None
    data: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = zip([0.0, *self.times], [*self.times, 1.0], strict=True)
        if len(self.times) < 2 or any(a > b for a, b in steps):
            raise UserError("times must be at least two numbers that increase from 0 to 1")


FACTS: dict[str, type[Facts]] = {
    "images": ImageFacts,
    "latents": LatentFacts,
    "trajectories": TrajectoryFacts,
}  # by kind


@dataclass(frozen=True)
class Entry:
    """One shard in checksums.json."""

    rows: int
    bytes: int
    sha256: str
    left_out: list[str]  # files that were not intact images

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise UserError(f"rows is {self.rows}")


@dataclass(frozen=True)
class Signature:
    """The metadata in the header of a shard."""

    written_by: str
    facts: str  # ``identity`` of the set's facts
    left_out: list[str]


def read_facts(file: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Return the facts in KIND.json, checked."""
    facts = read_json(file, remedy)
    version = facts.get("format", "of an unknown number") if isinstance(facts, dict) else FORMAT
    if version != FORMAT:
        raise UserError(f"{file} has format {version}, this version reads {FORMAT}: {remedy}")
    try:
        return complete(kind, facts, str(file))
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None


def complete(kind: str, facts: Any, where: str) -> dict[str, Any]:
    """Return ``facts``, checked and with those that may be left out, as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(parse(FACTS[kind], facts, where))))
    return found


def read_checksums(file: Path, remedy: str) -> list[Entry]:
    """Return the entries of checksums.json by shard; it may list the set's shards only, and all of them."""
    content = read_json(file, remedy)
    try:
        entries = parse(dict[str, Any], content, str(file))
        entries.pop(WRITTEN_BY, None)
        for number, name in enumerate(entries):
            if name != shard_name(number):
                raise UserError(f"{file} lists {name!r} in place of {shard_name(number)}")
        return [parse(Entry, entry, f"{file}: {name}") for name, entry in entries.items()]
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None


def identity(facts: dict[str, Any]) -> str:
    """Return a SHA-256 over the facts but for ``sources``, since a copy of the pictures may have other times."""
    kept = {name: value for name, value in facts.items() if name not in ("sources", WRITTEN_BY)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sign(facts: str, left_out: list[str]) -> dict[str, str]:
    """Return the metadata of a shard of the set with that ``identity``: one entry, since their order is not fixed."""
    return {"set": json.dumps({WRITTEN_BY: "flowmaps", "facts": facts, "left_out": left_out})}


def read_header(file: Path) -> tuple[Signature, int] | None:
    """Return signature and rows of a shard; None if it is not an intact one."""
    try:
        with safe_open(file, "pt") as shard:
            signature = parse(Signature, parse_json(shard.metadata()["set"], "", ""), "")
            return signature, min(int(shard.get_slice(name).get_shape()[0]) for name in shard.keys())
    except (SafetensorError, OSError, UserError, KeyError, TypeError, ValueError, IndexError):
        return None


def verify(file: Path, expected: str, remedy: str) -> None:
    """Compare the content of a shard with its SHA-256; one that passed is remembered by path, size and time."""
    seen = file.stat()
    key = f"{file.resolve()} {seen.st_size} {seen.st_mtime_ns} {expected}"
    passed = cache_directory() / "shards" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if passed.is_file():
            return
    if sha256(file) != expected:
        raise UserError(f"{file} is damaged, its checksum differs: {remedy}")
    with contextlib.suppress(OSError):  # only a cache: without it the next process compares again
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
