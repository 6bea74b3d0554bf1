"""Conditions from files: what each item of a data set, or each sample, is conditioned on."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmaps.data.builtin import ArrayData
from flowmaps.data.dataset import Batch, DataSet
from flowmaps.data.file_source import SUFFIXES
from flowmaps.data.image_folder import ImageFiles
from flowmaps.data.image_io import BadImage, decode
from flowmaps.data.registry import open_dataset
from flowmaps.data.shards import Latents
from flowmaps.data.tables import read_vectors
from flowmaps.errors import UserError, blame, shorten
from flowmaps.files import sha256
from flowmaps.images import from_uint8
from flowmaps.reading import regular_file

REMEDY = "give an .npy file of conditions, a picture, a folder or zip file of pictures, or hf:PLACE#COLUMN"


@dataclass(frozen=True)
class Conditions:
    """Conditions of one shape, floats; images in [-1, 1], smaller ones enlarged by repetition of their pixels.

    Args:
        rows: What they are read from: an .npy file of [n, ...], an array, or a data set of images.
        shape: The shape of one of them, as a network takes it.
    """

    rows: Any
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self._stored)

    def __getstate__(self) -> dict[str, Any]:  # without the mapped file, which each process opens for itself
        return {"rows": self.rows, "shape": self.shape}

    @functools.cached_property
    def _stored(self) -> Any:
        return _mapped(self.rows) if isinstance(self.rows, Path) else self.rows

    def fetch(self, index: Tensor) -> Tensor:
        """Return the conditions at ``index`` [b]: floats [b, *shape]."""
        if isinstance(self._stored, np.ndarray):
            found = torch.from_numpy(np.array(self._stored[index.numpy()]))
        else:
            found = self._stored.fetch(index)[0]
        found = from_uint8(found) if found.dtype == torch.uint8 else found.float()
        if not bool(torch.isfinite(found).all()):
            raise UserError("a condition is not finite")
        factor = self.shape[-1] // found.shape[-1] if len(self.shape) == 3 else 1
        return F.interpolate(found, scale_factor=factor, mode="nearest") if factor > 1 else found

    def digest(self) -> str:
        """Return the SHA-256 over all conditions, or the fingerprint of their data set."""
        if isinstance(self.rows, np.ndarray):
            return hashlib.sha256(self.rows.tobytes()).hexdigest()
        return sha256(self.rows) if isinstance(self.rows, Path) else str(self.rows.digest())


@dataclass(frozen=True)
class Paired:
    """Fetches the items of ``data`` with the conditions at the same places as their labels."""

    data: Any
    conditions: Conditions

    def fetch(self, index: Tensor) -> Batch:
        """Return the items at ``index`` [b] as they are stored, and their conditions."""
        return self.data.fetch(index)[0], self.conditions.fetch(index)


def open_conditions(source: str | Path, shape: tuple[int, ...]) -> Conditions:
    """Open conditions of ``shape`` for training or for sampling.

    Args:
        source: An .npy file of floats [n, *shape], or of images uint8 [n, C, H, W]; a picture; a folder or zip file of
            pictures, or a set that prepare_data.py wrote; ``hf:PLACE#COLUMN``, a column of vectors or of pictures of a
            Hugging Face dataset. Pictures may be smaller than ``shape`` by an integer factor.
        shape: The shape of one condition (``FlowMapInfo.condition``).

    Raises:
        UserError: There is no such file, it is damaged, or what it holds has another shape.
    """
    with blame("condition", source):
        rows, found, image = _opened(str(source))
        if found != tuple(shape) and not (image and _enlarged(found, tuple(shape))):
            raise UserError(f"has conditions of shape {found}, the model takes {tuple(shape)}")
        return Conditions(rows, tuple(shape))


def _opened(source: str) -> tuple[Any, tuple[int, ...], bool]:
    """Return what ``source`` holds, the shape of one row of it, and whether that is an image of uint8."""
    path = Path(source)
    if path.suffix == ".npy":
        return path, *_check_npy(path)
    if source.startswith("hf:"):
        vectors = read_vectors(source.removeprefix("hf:"))
        if vectors is not None:
            return vectors, vectors.shape[1:], False
    elif not path.exists():
        raise UserError(f"no such file or folder: {REMEDY}")
    picture = path.suffix.lower() in SUFFIXES and not path.is_dir()
    rows = ArrayData(_picture(path)) if picture else open_dataset(source)
    if isinstance(rows, Latents):
        raise UserError(f"holds latents: {REMEDY}")
    return rows, tuple(rows.shape), True


def check_pairs(data: DataSet, conditions: Conditions) -> None:
    """Refuse conditions that are not one for each item, files by the same names but for their suffixes."""
    if len(conditions) != len(data):
        raise UserError(f"has {len(conditions):,} conditions for {len(data):,} images")
    if isinstance(data, ImageFiles) and isinstance(conditions.rows, ImageFiles):
        for ours, theirs in zip(data.names, conditions.rows.names, strict=True):
            if PurePath(ours).with_suffix("") != PurePath(theirs).with_suffix(""):
                raise UserError(f"has {shorten(theirs)} in the place of {shorten(ours)}: give pairs the same names")


def _enlarged(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether images of the one shape are those of the other, smaller by an integer factor."""
    if len(found) != 3 or len(shape) != 3 or found[0] != shape[0] or not found[1]:
        return False
    factor = shape[1] // found[1]
    return factor > 0 and shape[1:] == (factor * found[1], factor * found[2])


def _picture(path: Path) -> Tensor:
    try:
        pixels = decode(regular_file(path, REMEDY).read_bytes())
    except BadImage as error:
        raise UserError(f"is not an intact picture ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _mapped(path: Path) -> Any:
    """Return the array of an .npy file, which stays on the disk."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_npy(path: Path) -> tuple[tuple[int, ...], bool]:
    """Return the shape of one row of an .npy file, and whether they are images of uint8."""
    try:
        rows = _mapped(regular_file(path, REMEDY))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, MemoryError, OverflowError) as error:
        raise UserError(f"is not a readable .npy file ({shorten(error, 120)}): {REMEDY}") from None
    kind = getattr(rows, "dtype", None)
    image = kind == np.uint8 and rows.ndim == 4
    if not isinstance(rows, np.ndarray) or rows.ndim < 2 or not len(rows) or not (image or rows.dtype.kind == "f"):
        raise UserError(f"must hold floats [n, ...], or images uint8 [n, C, H, W]: {REMEDY}")
    return tuple(rows.shape[1:]), image
