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
from flowmaps.data.image_folder import PREFIXES, open_images
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
FORMATS = (
    "folder",
    "zip",
    "prepared",
    *PREFIXES,
)  # names for the data at ``root``; prepared: by prepare_data.py


def open_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    root: str | Path = "data",
    size: int | None = None,
    skip_corrupt: bool = False,
    fit: str = "crop",
    background: str = "white",
) -> DataSet:
    """Open a data set, for training or for scoring.

    Args:
        name_or_path: One of ``DATASETS``, also with its split (``"digits:heldout"``, ``"digits-heldout"``); the path of
            a folder or zip file of images, of a set that prepare_data.py wrote, or of an .npz of samples; ``hf:`` or
            ``wds:`` with the address of a Hugging Face dataset (``hf:uoft-cs/cifar100@test``) or of WebDataset shards;
            or one of ``FORMATS``, whose path or address is ``root``. A ``Path`` is never taken for a name.
        split: "train" or "heldout", if the name has no split. Only the built-in data sets have a "heldout".
        root: Folder of the built-in data sets' files, or the path or address of a format.
        size: Make image files squares of this many pixels; None leaves them as they are.
        skip_corrupt: Leave out files that are not intact images instead of refusing them.
        fit: The way to a square: "crop" takes the central one, "pad" adds ``background``.
        background: "white", "black" or "grey", also behind transparent pixels.

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
        return _open_format(str(name_or_path), root, size, skip_corrupt, fit, background)
    check_source(name_or_path)
    if is_address(name_or_path):
        return open_images(name_or_path, size, skip_corrupt, fit, background)
    path = Path(name_or_path)
    if prepared_kind(path):
        return _open_prepared(path)
    if path.is_dir() or path.suffix == ".zip":
        return open_images(path, size, skip_corrupt, fit, background)
    return ArrayData(_read_samples(path), name=path.name)


def builtin_name(source: str | Path, split: str = "train") -> tuple[str, str] | None:
    """Return name and split of a built-in data set, NAME, NAME:split or NAME-split; None for an existing path."""
    found = re.fullmatch(rf"({'|'.join(DATASETS)})(?:[:-](\w+))?", str(source))
    return None if found is None or Path(source).exists() else (found[1], found[2] or split)


def is_address(source: str | Path) -> bool:
    """Tell hf:ADDRESS and wds:ADDRESS from the path of an existing file."""
    prefix, colon, _ = str(source).partition(":")
    return isinstance(source, str) and bool(colon) and prefix in PREFIXES and not Path(source).exists()


def source_of(name: str, root: str) -> str:
    """Return what flags such as --data and --reference call the data that a config names, other than its root."""
    return f"{name}:{root}" if name in PREFIXES else root if name in FORMATS else name


def check_source(name_or_path: str | Path) -> None:
    """Refuse, before any slow work, what is neither a path, an address, nor the name of a built-in data set."""
    if is_address(name_or_path):
        return
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


def _open_format(
    name: str, root: str | Path, size: int | None, skip_corrupt: bool, fit: str, background: str
) -> DataSet:
    if name in PREFIXES:
        return open_images(f"{name}:{root}", size, skip_corrupt, fit, background)
    root = Path(root)
    if name == "prepared":
        return _open_prepared(root)
    if prepared_kind(root):
        raise UserError("a set written by prepare_data.py: set name=prepared", field="root", value=root)
    if root.exists() and root.is_dir() != (name == "folder"):
        raise UserError(f"{root} is not a {name}: choose folder or zip", field="name", value=name)
    return open_images(root, size, skip_corrupt, fit, background)


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
