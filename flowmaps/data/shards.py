"""Data sets on disk in shards: written once by ``shard_writing``, and read in any order."""

import hashlib
import json
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowmaps.data.dataset import Batch, DataSet, named
from flowmaps.data.shard_files import CHECKSUMS, identity, read_checksums, read_facts, shard_name, verify
from flowmaps.errors import UserError
from flowmaps.vae import channels


@dataclass(frozen=True)
class Shards(DataSet):
    """A data set in files that are mapped into memory; each row is read from disk on demand.

    The content of a file is compared with its checksum before the first row of it is read.
    """

    kind: ClassVar[str]
    command: ClassVar[str]  # the sub-command of prepare_data.py that writes such a set
    tensor: ClassVar[str]  # the name of the samples in a shard; the other tensor is their label
    types: ClassVar[tuple[str, ...]] = ("F16", "F32")  # that they may have

    root: Path
    facts: dict[str, Any]
    ends: list[int]  # rows up to the end of each shard
    sums: tuple[str, ...] = ()  # SHA-256 of each shard
    _open: dict[int, Any] = field(default_factory=dict, compare=False)  # by shard

    @classmethod
    def open(cls, root: str | Path) -> Self:
        """Open the complete set in the directory ``root``; errors name the damaged file."""
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{root}: no such directory; create it with scripts/prepare_data.py {cls.command}")
        for name in (f"{cls.kind}.json", CHECKSUMS):
            if not (root / name).exists():
                raise UserError(f"{root} is not a complete set of {cls.kind} (no {name}): {cls.remedy()}")
        facts = read_facts(root / f"{cls.kind}.json", cls.kind, "prepare the set again in a new directory")
        entries = read_checksums(root / CHECKSUMS, f"remove it, and {cls.remedy()}")
        for number, entry in enumerate(entries):
            file = root / shard_name(number)
            if not file.is_file() or file.stat().st_size != entry.bytes:
                raise UserError(f"{file} is missing or damaged: {cls.remedy()}")
        if not (ends := list(accumulate(entry.rows for entry in entries))) or not ends[-1]:
            raise UserError(f"{root} has no items: prepare the set again in a new directory")
        return cls(root, facts, ends, tuple(entry.sha256 for entry in entries))

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

    @property
    def class_names(self) -> tuple[str, ...]:
        return named(self.facts.get("classes", ()))

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of one stored item."""
        return self.shape

    def digest(self) -> str:
        """Return a SHA-256 over the facts and the checksums of the shards."""
        facts = read_facts(self.root / f"{self.kind}.json", self.kind, "restore it")  # those of a run may be others
        return hashlib.sha256(json.dumps([identity(facts), self.ends, self.sums]).encode()).hexdigest()

    def file_of(self, item: int) -> str:
        """Return the file that an item is read from."""
        return str(self.root / shard_name(bisect(self.ends, item)))

    def fetch(self, index: Tensor) -> Batch:
        rows, labels = [], []
        for i in index.tolist():
            number = bisect(self.ends, i)
            row = i - (self.ends[number - 1] if number else 0)
            try:
                if number not in self._open:
                    self._open[number] = self._shard(number)
                stored, label = self._open[number]
                rows.append(stored[row])
            except (SafetensorError, OSError) as error:
                file = self.root / shard_name(number)
                raise UserError(f"{file} is damaged ({error}): {self.remedy()}") from None
            labels += [] if label is None else [label[row]]
        return torch.stack(rows), torch.stack(labels) if labels else None

    def _shard(self, number: int) -> tuple[Any, Tensor | None]:
        """Open a shard: its samples, of which rows can be read, and the labels of all rows."""
        file, rows = self.root / shard_name(number), self.ends[number] - ([0, *self.ends][number])
        if self.sums:
            verify(file, self.sums[number], self.remedy())
        shard: Any = safe_open(file, framework="pt")
        stored, label = shard.get_slice(self.tensor), None
        shape, dtype = stored.get_shape(), stored.get_dtype()
        if shape != [rows, *self.stored] or dtype not in self.types:
            expected = f"{' or '.join(self.types)} {[rows, *self.stored]}"
            raise UserError(f"{file} has {self.tensor} {dtype} {shape}, expected {expected}: {self.remedy()}")
        if self.num_classes:
            label = shard.get_tensor("label").clone()
            fits = label.dtype == torch.int64 and label.shape == (rows,)
            if not fits or bool(((label < 0) | (label >= self.num_classes)).any()):
                raise UserError(f"{file} has labels that are not {rows} of {self.num_classes} classes: {self.remedy()}")
        return stored, label


class TrajectoryFiles(Shards):
    """Items are trajectories: states [N + 1, ...] float32."""

    kind, command, tensor = "trajectories", "trajectories", "states"

    @property
    def times(self) -> Tensor:
        """float64 [N + 1]."""
        return torch.tensor(self.facts["times"], dtype=torch.float64)

    @property
    def stored(self) -> tuple[int, ...]:
        return (len(self.facts["times"]), *self.shape)


class PreparedImages(Shards):
    """Items are square images [3, size, size] uint8."""

    kind, command, tensor, types = "images", "imagenet", "images", ("U8",)


class Latents(Shards):
    """Items are the moments [2, C, h, w] float16 that a VAE's encoder gives for an image: mean, standard deviation."""

    kind, command, tensor = "latents", "latents", "moments"

    @property
    def stored(self) -> tuple[int, ...]:
        return (2, *self.shape)

    @property
    def info(self) -> dict[str, Any]:
        """The fields of ``FlowMapInfo`` that describe the latents."""
        shift, scale = (tuple(self.facts[name]) for name in ("latent_shift", "latent_scale"))
        values = tuple(self.facts["vae_range"])
        return {"vae": self.facts["vae"], "vae_range": values, "latent_shift": shift, "latent_scale": scale}

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw one z = mean + std noise per row and scale it for the network: scale (z - shift), float32."""
        mean, std = moments.float().unbind(dim=1)
        shift, scale = (channels(tuple(self.facts[name]), mean) for name in ("latent_shift", "latent_scale"))
        return (mean + std * noise - shift) * scale
