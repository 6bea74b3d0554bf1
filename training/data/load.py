"""What a run trains on, by name."""

from pathlib import Path

from flowmaps.errors import UserError
from training.data.arrays import DATA, load_arrays
from training.data.files import open_images
from training.data.loader import DataSet

FILES = ("folder", "zip")  # the user's own images


def load_data(name: str, root: str = "data", size: int | None = None, skip_corrupt: bool = False) -> DataSet:
    """What a run trains on: the training split of ``DATA[name]``, or "folder" or "zip", the images in ``root``.

    Those are cropped and resized to ``size``; ``skip_corrupt`` leaves out files that are no whole images instead of
    refusing them.
    """
    if name not in FILES:
        if name not in DATA:
            raise UserError(f"unknown data set {name!r}: choose one of {', '.join((*DATA, *FILES))}")
        return load_arrays(name, "train", root)
    if Path(root).exists() and Path(root).is_dir() != (name == "folder"):
        raise UserError(f"--config.data.name={name}, but --config.data.root={root} is none: choose folder or zip")
    return open_images(Path(root), size, skip_corrupt)
