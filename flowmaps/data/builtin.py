"""The built-in data sets, all in memory; the table of their names is ``flowmaps.data.registry.DATASETS``."""

import codecs
import hashlib
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmaps.data.dataset import Batch, DataSet
from flowmaps.errors import UserError
from flowmaps.reading import read_bytes
from flowmaps.rng import generator

FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"  # by number, as for CIFAR-10
CIFAR = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
LARGEST = 1 << 26  # bytes of a file, also unpacked; Fashion-MNIST's has 47 million
REMEDY = "delete it and download the data set again"


@dataclass(frozen=True)
class ArrayData(DataSet):
    """A data set as one tensor: images uint8 [n, C, H, W] or points float32 [n, dim], and labels int64 [n] or None."""

    x: Tensor
    label: Tensor | None = None
    num_classes: int = 0
    name: str = ""
    split: str = ""
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def digest(self) -> str:
        """Return a SHA-256 over the samples."""
        return hashlib.sha256(self.x.contiguous().numpy().tobytes()).hexdigest()

    def fetch(self, index: Tensor) -> Batch:
        return self.x[index], None if self.label is None else self.label[index]


def checkerboard(split: str, root: str, size: int = 1_000_000) -> ArrayData:
    """Uniform points on the even cells (i + j even) of a 4 x 4 board on [-1, 1]^2; density 1/2 there."""
    g = generator(0, f"checkerboard-{split}", 0)
    column = torch.randint(0, 4, (size,), generator=g)
    row = 2 * torch.randint(0, 2, (size,), generator=g) + column % 2
    corner = torch.stack([column, row], dim=1)
    return ArrayData(-1 + 0.5 * (corner + torch.rand(size, 2, generator=g)))


def digits(split: str, root: str) -> ArrayData:
    """scikit-learn's 1797 scanned digits, 8 x 8 grey; every fourth image belongs to the split heldout."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits data set needs scikit-learn: pip install scikit-learn") from None
    scans = load_digits()
    images = torch.tensor(scans.images)[:, None] * (255 / 16)  # scans have 17 grey levels
    held_out = torch.arange(len(images)) % 4 == 3
    keep = held_out if split == "heldout" else ~held_out
    label, names = torch.tensor(scans.target)[keep], tuple("0123456789")
    return ArrayData(images[keep].round().to(torch.uint8), label, 10, class_names=names)


def fashion_mnist(split: str, root: str) -> ArrayData:
    """Fashion-MNIST, 28 x 28 grey padded to 32 x 32: 60,000 images; the split heldout has the 10,000 test images.

    Reads torchvision's layout, ``root``/FashionMNIST/raw, with the files compressed or extracted.
    """
    part = "t10k" if split == "heldout" else "train"
    folder = Path(root) / "FashionMNIST" / "raw"
    images = _idx(folder / f"{part}-images-idx3-ubyte", 3, root)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte", 1, root).long()
    if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= 10:
        raise UserError(
            f"{folder} has {part} images of shape {tuple(images.shape)} for {len(labels)} labels, which is not "
            "Fashion-MNIST: delete the folder and download the data set again"
        )
    return ArrayData(F.pad(images[:, None], (2, 2, 2, 2)), labels, 10, class_names=tuple(FASHION.split(",")))


def _idx(path: Path, dims: int, root: str) -> Tensor:
    """Read a file of the MNIST family's idx format: uint8 with ``dims`` dimensions, whose sizes are in its header."""
    try:
        packed = path.with_name(path.name + ".gz")
        if not path.exists() and not packed.exists():
            raise _missing(packed, root)
        content = read_bytes(path, REMEDY, LARGEST) if path.exists() else _unpacked(read_bytes(packed, REMEDY, LARGEST))
        if content[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"its header does not announce {dims}-dimensional bytes")
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except UserError:
        raise
    except (EOFError, struct.error, zlib.error, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from None
    return torch.from_numpy(array.copy())


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)  # gzip
    unpacked = unpacker.decompress(content, LARGEST)
    if not unpacker.eof:
        raise EOFError("it is cut off" if not unpacker.unconsumed_tail else f"more than {LARGEST:,} bytes")
    return unpacked


class _Arrays(pickle.Unpickler):
    """Reads CIFAR's pickles and nothing else: arrays, numbers and text."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct": _empty, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file needs")


def _empty(kind: Any, shape: Any, dtype: Any) -> Any:
    """Begin an array, which then takes its true shape from its content; a pickle could name any shape here."""
    return np.empty(0, np.uint8)


def cifar10(split: str, root: str) -> ArrayData:
    """CIFAR-10, 32 x 32 colour: 50,000 images; the split heldout has the 10,000 test images.

    Reads torchvision's layout, ``root``/cifar-10-batches-py, without executing its pickles.
    """
    folder = Path(root) / "cifar-10-batches-py"
    parts = ["test_batch"] if split == "heldout" else [f"data_batch_{i}" for i in range(1, 6)]
    images, labels = zip(*(_cifar_batch(folder / part, root) for part in parts), strict=True)
    return ArrayData(torch.cat(images), torch.cat(labels), 10, class_names=tuple(CIFAR.split(",")))


def _cifar_batch(path: Path, root: str) -> tuple[Tensor, Tensor]:
    try:
        if not path.exists():
            raise _missing(path, root)
        loaded = _Arrays(io.BytesIO(read_bytes(path, REMEDY, LARGEST)), encoding="latin1").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
        images = torch.from_numpy(content["data"]).reshape(-1, 3, 32, 32)
        labels = torch.tensor(content["labels"], dtype=torch.int64)
        if images.dtype != torch.uint8 or labels.shape != (len(images),) or not 0 <= labels.min() <= labels.max() < 10:
            raise ValueError("the images or labels are not CIFAR-10's")
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from None
    return images, labels


def _missing(path: Path, root: str) -> UserError:
    return UserError(
        f"{path} is missing: set root to the folder of the data set's files, or download them into it "
        "(data.download in a config, flowmaps.data.download in Python)",
        field="root",
        value=root,
    )


def download(name: str, root: str | Path) -> None:
    """Download the files of the data set ``name`` into ``root`` by torchvision; files that exist are kept."""
    from torchvision import datasets

    classes = {"cifar10": datasets.CIFAR10, "fashion_mnist": datasets.FashionMNIST}
    if name not in classes:
        raise UserError(f"{name} cannot be downloaded: only {', '.join(classes)} can")
    try:
        for train in (True, False):
            classes[name](root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot download {name} ({reason}): on a machine with internet let torchvision download it, copy its "
            f"folder into {root} and do not ask for the download"
        ) from None
