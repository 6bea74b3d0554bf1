"""Data sets in shards, as ``prepare_data.py`` writes them.

KIND.json                 what the set is; KIND is trajectories, images or latents
shard-00000.safetensors   tensors [n, ...]; all of a set have the same ones
checksums.json            rows, size and SHA-256 of each shard, written last: without it the set is not complete
"""

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

from flowmaps.errors import UserError
from flowmaps.latents import channels

FORMAT = 3


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shards:
    """A data set in files that are mapped into memory, each row read from disk when it is asked for."""

    kind: ClassVar[str]
    command: ClassVar[str]  # of prepare_data.py
    tensor: ClassVar[str]  # which of a shard's tensors the samples are; the other one is their label

    root: Path
    facts: dict[str, Any]
    ends: list[int]  # rows up to and with each shard
    _open: dict[int, Any] = field(default_factory=dict, compare=False)  # by shard

    @classmethod
    def open(cls, root: str | Path, flag: str) -> Self:
        """The complete set in the directory ``root``, which ``flag`` names; damage is refused by file name."""
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{flag}={root}: no such directory; make it by scripts/prepare_data.py {cls.command}")
        try:
            facts = json.loads((root / f"{cls.kind}.json").read_text())
            if facts["format"] != FORMAT:
                raise UserError(f"{flag}={root} has format {facts['format']}, this version reads {FORMAT}")
            shards = json.loads((root / "checksums.json").read_text())
            sizes = {name: int(shard["bytes"]) for name, shard in shards.items()}
            ends = list(accumulate(int(shard["rows"]) for shard in shards.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{flag}={root} is no complete set of {cls.kind} ({error}): {cls.remedy()}") from None
        for name, size in sizes.items():
            file = root / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"{file} is missing or damaged: {cls.remedy()}")
        return cls(root, facts, ends)

    @classmethod
    def remedy(cls) -> str:
        return f"run scripts/prepare_data.py {cls.command} with the same --out again"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.facts["shape"])

    @property
    def num_classes(self) -> int:
        """0: no labels."""
        return int(self.facts["num_classes"])

    def digest(self) -> str:
        """SHA-256 of what is known of the set and its shards."""
        files = (self.root / name for name in (f"{self.kind}.json", "checksums.json"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def file_of(self, item: int) -> str:
        """The file that an item is read from."""
        return str(self.root / shard_name(bisect(self.ends, item)))

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``index`` [b] as they are stored, and their label int64 [b]."""
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
        """What ``FlowMapInfo`` has of them."""
        shift, scale = (tuple(self.facts[name]) for name in ("latent_shift", "latent_scale"))
        return {"vae": self.facts["vae"], "latent_shift": shift, "latent_scale": scale}

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample z = mean + std noise of each row, scaled as the network expects: scale (z - shift), float32."""
        mean, std = moments.float().unbind(dim=1)
        shift, scale = (channels(tuple(self.facts[name]), mean) for name in ("latent_shift", "latent_scale"))
        return (mean + std * noise - shift) * scale
