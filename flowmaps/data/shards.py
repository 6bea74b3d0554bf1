"""Data sets on disk in shards: written once, in resumable runs, and read in any order.

KIND.json                 facts about the set; KIND is trajectories, images or latents
shard-00000.safetensors   tensors [n, ...], the same names in all shards of a set
checksums.json            rows, size and SHA-256 of each shard, written last: without it the set is not complete
"""

import hashlib
import json
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flowmaps.data.dataset import Batch, DataSet
from flowmaps.distributed import processes
from flowmaps.errors import UserError
from flowmaps.files import sha256, write_file
from flowmaps.info import VAE_RANGE  # of sets that do not say
from flowmaps.vae import channels

FORMAT = 3


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shards(DataSet):
    """A data set in files that are mapped into memory; each row is read from disk on demand."""

    kind: ClassVar[str]
    command: ClassVar[str]  # the sub-command of prepare_data.py that writes such a set
    tensor: ClassVar[str]  # the name of the samples in a shard; the other tensor is their label

    root: Path
    facts: dict[str, Any]
    ends: list[int]  # rows up to the end of each shard
    _open: dict[int, Any] = field(default_factory=dict, compare=False)  # by shard

    @classmethod
    def open(cls, root: str | Path) -> Self:
        """Open the complete set in the directory ``root``; errors name the damaged file."""
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{root}: no such directory; create it with scripts/prepare_data.py {cls.command}")
        try:
            facts = json.loads((root / f"{cls.kind}.json").read_text())
            if facts["format"] != FORMAT:
                raise UserError(f"{root} has format {facts['format']}, this version reads {FORMAT}")
            shards = json.loads((root / "checksums.json").read_text())
            sizes = {name: int(shard["bytes"]) for name, shard in shards.items()}
            ends = list(accumulate(int(shard["rows"]) for shard in shards.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{root} is not a complete set of {cls.kind} ({error}): {cls.remedy()}") from None
        for name, size in sizes.items():
            file = root / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"{file} is missing or damaged: {cls.remedy()}")
        return cls(root, facts, ends)

    @classmethod
    def remedy(cls) -> str:
        return f"run scripts/prepare_data.py {cls.command} again with the same output directory"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def crop(self) -> str:
        return str(self.facts.get("crop", "none"))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.facts["shape"])

    @property
    def num_classes(self) -> int:
        return int(self.facts["num_classes"])

    def digest(self) -> str:
        """Return a SHA-256 over the facts and the checksums of the shards."""
        files = (self.root / name for name in (f"{self.kind}.json", "checksums.json"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def file_of(self, item: int) -> str:
        """Return the file that an item is read from."""
        return str(self.root / shard_name(bisect(self.ends, item)))

    def fetch(self, index: Tensor) -> Batch:
        rows, labels = [], []
        for i in index.tolist():
            number = bisect(self.ends, i)
            row = i - (self.ends[number - 1] if number else 0)
            file = self.root / shard_name(number)
            try:
                if number not in self._open:
                    shard: Any = safe_open(file, framework="pt")
                    label = shard.get_tensor("label").clone() if self.num_classes else None
                    self._open[number] = shard.get_slice(self.tensor), label
                stored, label = self._open[number]
                rows.append(stored[row])
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged ({error}): {self.remedy()}") from None
            labels += [] if label is None else [label[row]]
        return torch.stack(rows), torch.stack(labels) if labels else None


class TrajectoryFiles(Shards):
    """Items are trajectories: states [N + 1, ...] float32."""

    kind, command, tensor = "trajectories", "trajectories", "states"

    @property
    def times(self) -> Tensor:
        """float64 [N + 1]."""
        return torch.tensor(self.facts["times"], dtype=torch.float64)


class PreparedImages(Shards):
    """Items are square images [3, size, size] uint8."""

    kind, command, tensor = "images", "imagenet", "images"


class Latents(Shards):
    """Items are the moments [2, C, h, w] float16 that a VAE's encoder gives for an image: mean, standard deviation."""

    kind, command, tensor = "latents", "latents", "moments"

    @property
    def info(self) -> dict[str, Any]:
        """The fields of ``FlowMapInfo`` that describe the latents."""
        shift, scale = (tuple(self.facts[name]) for name in ("latent_shift", "latent_scale"))
        low, high = self.facts.get("vae_range", VAE_RANGE)
        return {"vae": self.facts["vae"], "vae_range": (low, high), "latent_shift": shift, "latent_scale": scale}

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw one z = mean + std noise per row and scale it for the network: scale (z - shift), float32."""
        mean, std = moments.float().unbind(dim=1)
        shift, scale = (channels(tuple(self.facts[name]), mean) for name in ("latent_shift", "latent_scale"))
        return (mean + std * noise - shift) * scale


MakeShard = Callable[[int], tuple[dict[str, Tensor], list[str]]]  # number -> tensors [n, ...], files left out


def start_writing(out: Path, kind: str, facts: dict[str, Any], shards: int) -> list[int]:
    """Start or resume writing the set of ``kind`` that ``facts`` describe.

    Returns the numbers of the shards that this process has to make; one with a wrong checksum is made again.

    Raises:
        UserError: ``out`` holds a different set.
    """
    state = processes()
    card, facts = out / f"{kind}.json", {"format": FORMAT, **facts}
    with state.local_main_process_first():
        out.mkdir(parents=True, exist_ok=True)
        if other := sorted(file.name for file in out.glob("*.json") if file.name not in (card.name, "checksums.json")):
            raise UserError(f"has {other[0]}, another kind of set: choose a new directory", field="out", value=out)
        try:
            stored = {"vae_range": list(VAE_RANGE), **(json.loads(card.read_text()) if card.exists() else facts)}
            changed = [key for key in facts if stored[key] != facts[key]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{card} is damaged ({error}): choose a new directory", field="out", value=out) from None
        if changed:
            name = changed[0]
            raise UserError(
                f"has {kind} of another {name} ({stored[name]}, now {facts[name]}): choose a new directory",
                field="out",
                value=out,
            )
        if state.is_local_main_process:
            write_file(card, json.dumps(facts, indent=1).encode(), check=False)
            _remove_damaged(out)
    missing = [number for number in range(shards) if not (out / shard_name(number)).is_file()]
    state.wait_for_everyone()  # before any process writes a shard that another would see
    return missing[state.process_index :: state.num_processes]


def _remove_damaged(out: Path) -> None:
    try:
        known = json.loads((out / "checksums.json").read_text())
        for name, entry in known.items():
            if (out / name).is_file() and sha256(out / name) != entry["sha256"]:
                (out / name).unlink()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not written yet, or damaged: shards are written atomically, so the existing ones are complete


def write_missing(out: Path, shards: int, missing: list[int], make: MakeShard) -> Iterator[tuple[int, int]]:
    """Make the ``missing`` shards of this process, then the checksums of all; yields (shards made, shards to make)."""
    state = processes()
    yield 0, len(missing)
    for done, number in enumerate(missing, 1):
        tensors, left_out = make(number)
        write_file(out / shard_name(number), save(tensors, {"left_out": json.dumps(left_out)}), check=False)
        yield done, len(missing)
    state.wait_for_everyone()
    if state.is_main_process:
        files = [out / shard_name(number) for number in range(shards)]
        entries = {file.name: _entry(file) for file in files}
        write_file(
            out / "checksums.json",
            json.dumps(entries, indent=1).encode(),
            check=False,
        )


def _entry(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as shard:
        rows = shard.get_slice(next(iter(shard.keys()))).get_shape()[0]
        left_out = json.loads(shard.metadata()["left_out"])
    return {"rows": rows, "bytes": file.stat().st_size, "sha256": sha256(file), "left_out": left_out}
