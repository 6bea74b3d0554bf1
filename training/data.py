"""Data sets in memory, and the order in which a run visits them."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.images import from_uint8
from flowmaps.rng import generator


@dataclass(frozen=True)
class ArrayData:
    """A data set as one tensor: images uint8 [n, C, H, W] or points float32 [n, dim], and labels int64 [n] or None."""

    x: Tensor
    label: Tensor | None = None
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x.shape[1:])

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Samples at ``index`` [b] as float32, images in [-1, 1], with their labels."""
        x = self.x[index]
        return from_uint8(x) if x.dtype == torch.uint8 else x, None if self.label is None else self.label[index]


def checkerboard(split: str, root: str, size: int = 1_000_000) -> ArrayData:
    """Uniform points on the even cells (i + j even) of a 4 x 4 board on [-1, 1]^2; density 1/2 there."""
    g = generator(0, f"checkerboard-{split}", 0)
    column = torch.randint(0, 4, (size,), generator=g)
    row = 2 * torch.randint(0, 2, (size,), generator=g) + column % 2
    corner = torch.stack([column, row], dim=1)
    return ArrayData(-1 + 0.5 * (corner + torch.rand(size, 2, generator=g)))


def digits(split: str, root: str) -> ArrayData:
    """scikit-learn's 1797 scanned digits, 8 x 8 grey; every fourth image is held out ("heldout")."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits data set needs scikit-learn: pip install 'flowmaps[demo]'") from None
    scans = load_digits()
    images = torch.tensor(scans.images)[:, None] * (255 / 16)  # scans have 17 grey levels
    held_out = torch.arange(len(images)) % 4 == 3
    keep = held_out if split == "heldout" else ~held_out
    return ArrayData(images[keep].round().to(torch.uint8), torch.tensor(scans.target)[keep], num_classes=10)


def fashion_mnist(split: str, root: str) -> ArrayData:
    """Fashion-MNIST, 28 x 28 grey padded to 32 x 32: 60,000 images, and the 10,000 test images as "heldout".

    Reads torchvision's layout, ``root``/FashionMNIST/raw, its files gzip'd or extracted.
    """
    part = "t10k" if split == "heldout" else "train"
    folder = Path(root) / "FashionMNIST" / "raw"
    images = _idx(folder / f"{part}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte").long()
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} images but {len(labels)} labels: fetch the data set again")
    return ArrayData(F.pad(images, (2, 2, 2, 2)), labels, num_classes=10)


def _idx(path: Path) -> Tensor:
    """The bytes of a file in the MNIST family's idx format: uint8, of the shape in its header."""
    try:
        packed = path.with_name(path.name + ".gz")
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
        dims = content[3]
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except FileNotFoundError:
        raise UserError(
            f"{path}[.gz] is missing: give the data root (--root; in training --config.data.root)"
        ) from None
    except (OSError, EOFError, IndexError, struct.error, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch the data set again") from None
    return torch.from_numpy(array.copy())


DATA: dict[str, Callable[[str, str], ArrayData]] = {
    "checkerboard": checkerboard,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
}


def load_data(name: str, split: str = "train", root: str = "data") -> ArrayData:
    """A data set of the table ``DATA``, split "train" or "heldout"; ``root`` is where its files are."""
    if name not in DATA:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATA)}")
    if split not in ("train", "heldout"):
        raise UserError(f"unknown split {split!r} of {name}: choose train or heldout")
    return DATA[name](split, root)


class Order:
    """The endless order of visits: position p is item p mod n of a permutation keyed by (seed, p div n).

    A function of position alone, so that it needs no state in a checkpoint and no agreement between processes.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}  # a batch may straddle two
            self._epochs[epoch] = torch.randperm(self.n, generator=generator(self.seed, "order", epoch))
        return self._epochs[epoch]

    def indices(self, start: int, count: int) -> Tensor:
        """Item indices int64 [count] at positions ``start`` .. ``start + count - 1``."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.n)
            parts.append(self._epoch(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)
