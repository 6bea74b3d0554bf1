"""Trajectories in files, as ``prepare_data.py trajectories`` writes them.

trajectories.json         what they are: times, solver, teacher, shape, classes, count
shard-00000.safetensors   states [n, N + 1, ...] float32 and, with classes, label [n] int64
checksums.json            size and SHA-256 of each shard, written last: without it the set is not complete
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowmaps.errors import UserError

FORMAT = 2
REMEDY = "run scripts/prepare_data.py trajectories with the same --out again"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class TrajectoryFiles:
    """A data set whose items are trajectories: states [N + 1, ...] and label, read from disk at each visit."""

    root: Path
    facts: dict[str, Any]
    _open: dict[str, Any] = field(default_factory=dict, compare=False)  # by shard

    @classmethod
    def open(cls, root: str | Path) -> "TrajectoryFiles":
        """The complete set in the directory ``root``; damage is refused by file name."""
        root, flag = Path(root), f"--config.trajectories.files={root}"
        if not root.is_dir():
            raise UserError(f"{flag}: no such directory; make it by scripts/prepare_data.py trajectories")
        try:
            facts = json.loads((root / "trajectories.json").read_text())
            if facts["format"] != FORMAT:
                raise UserError(f"{flag} has format {facts['format']}, this version reads {FORMAT}")
            sizes = {name: entry["bytes"] for name, entry in json.loads((root / "checksums.json").read_text()).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{flag} is no complete set of trajectories ({error}): {REMEDY}") from None
        for name, size in sizes.items():
            file = root / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"{file} is missing or damaged: delete it and {REMEDY}")
        return cls(root, facts)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "facts": self.facts, "_open": {}}

    def __len__(self) -> int:
        return int(self.facts["num"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one state."""
        return tuple(self.facts["shape"])

    @property
    def num_classes(self) -> int:
        return int(self.facts["num_classes"])

    @property
    def times(self) -> Tensor:
        """float64 [N + 1]."""
        return torch.tensor(self.facts["times"], dtype=torch.float64)

    def digest(self) -> str:
        """SHA-256 of what is known of the set and its shards."""
        files = (self.root / name for name in ("trajectories.json", "checksums.json"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """States [b, N + 1, ...] of trajectories ``index`` [b], and their label."""
        states, labels = [], []
        for i in index.tolist():
            number, row = divmod(i, self.facts["shard"])
            name = shard_name(number)
            try:
                if name not in self._open:
                    self._open[name] = safe_open(self.root / name, framework="pt")
                states.append(self._open[name].get_slice("states")[row])
                if self.num_classes:
                    labels.append(self._open[name].get_slice("label")[row : row + 1])
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.root / name} is damaged ({error}): delete it and {REMEDY}") from None
        return torch.stack(states), torch.cat(labels) if labels else None
