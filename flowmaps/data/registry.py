"""Data sets by name or path: the table of built-in names, and the only place that decides which class opens what."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flowmaps.data.builtin import ArrayData, checkerboard, cifar10, digits, fashion_mnist
from flowmaps.data.dataset import DataSet
from flowmaps.data.image_folder import open_images
from flowmaps.data.shards import Latents, PreparedImages, Shards, TrajectoryFiles
from flowmaps.errors import UserError
from flowmaps.images import from_uint8
from flowmaps.reading import read_npz

DATASETS: dict[str, Callable[[str, str], ArrayData]] = {  # name -> opener(split, root)
    "checkerboard": checkerboard,
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
}
FORMATS = ("folder", "zip", "prepared")  # names for the data at ``root``: images, or a set that prepare_data.py wrote


def open_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    root: str | Path = "data",
    size: int | None = None,
    skip_corrupt: bool = False,
) -> DataSet:
    """Open a data set, for training or for scoring.

    Args:
        name_or_path: One of ``DATASETS``, also with its split (``"digits:heldout"``, ``"digits-heldout"``); the path of
            a folder or zip file of images, of a set that prepare_data.py wrote, or of an .npz of samples; or one of
            ``FORMATS``, whose path is ``root``. A ``Path`` is never taken for a name.
        split: "train" or "heldout", if the name has no split. Only the built-in data sets have a "heldout".
        root: Folder of the built-in data sets' files, or the path of a format.
        size: Crop the images of a folder or zip file to squares of this many pixels; None leaves them as they are.
        skip_corrupt: Leave out files that are not intact images instead of refusing them.

    Returns:
        A ``DataSet``: ``ArrayData``, ``ImageFiles``, ``PreparedImages`` or ``Latents``.

    Raises:
        UserError: There is no such data set, its files are missing or damaged, or they are trajectories.

    Example:
        >>> data = open_dataset("digits", "heldout")
        >>> images, labels = data.fetch(torch.arange(4))  # uint8 [4, 1, 8, 8], int64 [4]
    """
    if found := (str(name_or_path), split) if name_or_path in DATASETS else builtin_name(name_or_path, split):
        name, split = found
        if split not in ("train", "heldout"):
            raise UserError(f"unknown split {split!r} of {name}: choose train or heldout")
        return replace(DATASETS[name](split, str(root)), name=name, split=split)
    if split != "train":
        raise UserError(f"only {', '.join(DATASETS)} have a split {split!r}", field="split", value=split)
    if name_or_path in FORMATS:
        return _open_format(str(name_or_path), Path(root), size, skip_corrupt)
    check_source(name_or_path)
    path = Path(name_or_path)
    if prepared_kind(path):
        return _open_prepared(path)
    if path.is_dir() or path.suffix == ".zip":
        return open_images(path, size, skip_corrupt)
    return ArrayData(_read_samples(path), name=path.name)


def builtin_name(source: str | Path, split: str = "train") -> tuple[str, str] | None:
    """Return name and split of a built-in data set, NAME, NAME:split or NAME-split; None for an existing path."""
    found = re.fullmatch(rf"({'|'.join(DATASETS)})(?:[:-](\w+))?", str(source))
    return None if found is None or Path(source).exists() else (found[1], found[2] or split)


def check_source(name_or_path: str | Path) -> None:
    """Refuse, before any slow work, what is neither a path nor the name of a built-in data set."""
    if not builtin_name(name_or_path) and not Path(name_or_path).exists():
        raise UserError(
            f"no such file or folder, and not a data set ({', '.join(DATASETS)})", field="name", value=name_or_path
        )


def prepared_kind(root: Path) -> type[Shards] | None:
    """Return the kind of set that prepare_data.py wrote to ``root``; None if it is not such a set."""
    kinds: tuple[type[Shards], ...] = (PreparedImages, Latents, TrajectoryFiles)
    return next((kind for kind in kinds if (root / f"{kind.kind}.json").is_file()), None)


def as_samples(data: DataSet, x: Tensor, noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Convert stored items ``x`` [B, ...] of ``data`` to samples: images in [-1, 1], points, or drawn latents.

    Latents are drawn with ``noise(shape)``, standard normal, on the device of ``x``.
    """
    if isinstance(data, Latents):
        return data.draw(x, noise((len(x), *data.shape)))
    return from_uint8(x) if x.dtype == torch.uint8 else x


def _open_format(name: str, root: Path, size: int | None, skip_corrupt: bool) -> DataSet:
    if name == "prepared":
        return _open_prepared(root)
    if prepared_kind(root):
        raise UserError("a set written by prepare_data.py: set name=prepared", field="root", value=root)
    if root.exists() and root.is_dir() != (name == "folder"):
        raise UserError(f"{root} is not a {name}: choose folder or zip", field="name", value=name)
    return open_images(root, size, skip_corrupt)


def _open_prepared(root: Path) -> DataSet:
    kind = prepared_kind(root) or PreparedImages  # whose error says what is missing
    if kind is TrajectoryFiles:
        raise UserError("holds trajectories: set trajectories.files for those", field="root", value=root)
    return kind.open(root)


def _read_samples(file: Path) -> Tensor:
    arrays = read_npz(file, "images are in the format that sample.py writes", {"samples", "arr_0"})
    array = arrays.get("samples", arrays.get("arr_0"))
    if array is None:
        raise UserError(f"{file} has neither 'samples' nor 'arr_0': sample.py writes samples-N.npz")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UserError(f"{file}: images must be uint8 [n, h, w, 1 or 3], got {array.dtype} {array.shape}")
    return rearrange(torch.from_numpy(array), "n h w c -> n c h w")
