"""What a run trains on, by name."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.images import from_uint8
from training.data.arrays import DATA, load_arrays
from training.data.files import open_images
from training.data.loader import DataSet
from training.data.shards import Latents, PreparedImages, Shards, TrajectoryFiles

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
