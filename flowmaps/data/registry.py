"""Data sets by name or path: the one place that decides which class opens what."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flowmaps.data.builtin import DATA, ArrayData, load_arrays
from flowmaps.data.image_folder import ImageFiles, open_images
from flowmaps.data.loader import DataSet
from flowmaps.data.shards import Latents, PreparedImages, Shards, TrajectoryFiles
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import UserError
from flowmaps.files import read_npz
from flowmaps.images import from_uint8

FILES = ("folder", "zip", "prepared")  # the user's own images; and what prepare_data.py made of them


def prepared(root: str | Path) -> type[Shards] | None:
    """Which kind of set prepare_data.py wrote to ``root``, if it did."""
    kinds: tuple[type[Shards], ...] = (PreparedImages, Latents, TrajectoryFiles)
    return next((kind for kind in kinds if (Path(root) / f"{kind.kind}.json").is_file()), None)


def load_data(name: str, root: str = "data", size: int | None = None, skip_corrupt: bool = False) -> DataSet:
    """What a run trains on: the training split of ``DATA[name]``, or one of ``FILES`` in ``root``.

    Images of a folder or zip are cropped and resized to ``size``; ``skip_corrupt`` leaves out files that are no whole
    images instead of refusing them.
    """
    if name not in FILES:
        if name not in DATA:
            raise UserError(f"unknown data set {name!r}: choose one of {', '.join((*DATA, *FILES))}")
        return load_arrays(name, "train", root)
    kind = prepared(root)
    if name == "prepared":
        if kind is TrajectoryFiles:
            raise UserError(f"--config.data.root={root} has trajectories: those are --config.trajectories.files")
        return (kind or PreparedImages).open(root, "--config.data.root")
    if kind is not None:
        raise UserError(f"--config.data.root={root} is a set of prepare_data.py: --config.data.name=prepared")
    if Path(root).exists() and Path(root).is_dir() != (name == "folder"):
        raise UserError(f"--config.data.name={name}, but --config.data.root={root} is none: choose folder or zip")
    return open_images(Path(root), size, skip_corrupt)


def open_data(source: str, root: str, size: int | None) -> DataSet:
    """The training split of a known data set, whose files are in ``root``; or the folder, zip or set ``source``."""
    if source in DATA:
        return load_arrays(source, "train", root)
    name = "prepared" if prepared(source) else "zip" if source.endswith(".zip") else "folder"
    return load_data(name, source, size)


def as_samples(data: DataSet, x: Tensor, noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """What the flow map sees of the items ``x`` [B, ...] of ``data``: images in [-1, 1], points, or drawn latents.

    ``noise(shape)`` is for those: standard normal, on the device of ``x``.
    """
    if isinstance(data, Latents):
        return data.draw(x, noise((len(x), *data.shape)))
    return from_uint8(x) if x.dtype == torch.uint8 else x


def data_set(source: str) -> tuple[str, str] | None:
    """Name and split of a known data set, NAME, NAME:split or NAME-split; None if ``source`` is a path or nothing."""
    found = re.fullmatch(rf"({'|'.join(DATA)})(?:[:-](\w+))?", source)
    return None if found is None or Path(source).exists() else (found[1], found[2] or "train")


def check_source(source: str, flag: str) -> None:
    """Refuse a source that is nothing at all, before any slow work."""
    if not data_set(source) and not Path(source).exists():
        raise UserError(f"{flag}={source}: no such file or folder, and no data set ({', '.join(DATA)})")


@dataclass(frozen=True)
class Images:
    """A set of uint8 images [C, H, W] or points, what it is called, and how its images got their size."""

    data: DataSet
    name: str
    split: str = ""
    crop: str = "none"

    def content(self) -> str:
        """SHA-256 over all that the images' pixels are made of."""
        return self.data.content() if isinstance(self.data, ImageFiles) else self.data.digest()


def open_source(
    source: str, root: str, flag: str, size: int | None = None, skip_corrupt: bool = False, team: Team = ALONE
) -> Images:
    """The images of a data set NAME[:split] in ``root``, a folder or zip, a prepared set, or an .npz of sample.py.

    Images of a folder or zip are cropped and resized to ``size``; without it they must have one shape.
    """
    path = Path(source)
    if known := data_set(source):
        return Images(load_arrays(*known, root), *known)
    check_source(source, flag)
    if kind := prepared(path):
        if kind is not PreparedImages:
            raise UserError(f"{flag}={source} holds no images ({kind.kind}): give the images that they were made of")
        images = PreparedImages.open(path, flag)
        return Images(images, path.name, crop=images.facts["crop"])
    if path.is_dir() or path.suffix == ".zip":
        with team.main_process_first():  # it checks all images, and the others find what it noted
            files = open_images(path, size, skip_corrupt)
        return Images(files, path.name, crop="centre square, mean over areas" if size else "none")
    return Images(ArrayData(_archive(path, flag)), path.name)


def _archive(file: Path, flag: str) -> Tensor:
    arrays = read_npz(file, f"{flag} takes what sample.py wrote", {"samples", "arr_0"})
    array = arrays.get("samples", arrays.get("arr_0"))
    if array is None:
        raise UserError(f"{flag}={file} has neither 'samples' nor 'arr_0': sample.py writes samples-N.npz")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UserError(f"{flag}={file}: images must be uint8 [n, h, w, 1 or 3], got {array.dtype} {array.shape}")
    return rearrange(torch.from_numpy(array), "n h w c -> n c h w")
