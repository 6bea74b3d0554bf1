"""Sets of images to score or to compare with: opened by what the user calls them, and their features."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import read_npz
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.extractors import EXTRACTORS, Extractor, load_extractor
from training.data import (
    DATA,
    ArrayData,
    DataSet,
    ImageFiles,
    PreparedImages,
    in_order,
    load_arrays,
    open_images,
    prepared,
)
from training.processes import ALONE, Team


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
        with team.first_alone():  # it checks all images, and the others find what it noted
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


def pick_extractor(name: str | None, weights: str | None, source: str, device: torch.device) -> Extractor:
    """The extractor ``name``, else the one made for the data set ``source``, else Inception."""
    data = (data_set(source) or ("",))[0]
    return load_extractor(name or (data if data in EXTRACTORS else "inception"), weights, device)


def stats_of(images: Images, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """Moments of the features of ``images``, each process of the ``team`` working on its share."""
    share = team.share(len(images.data))
    batches = (rows for rows, _ in in_order(images.data, share))
    return team.merged(extractor.stats(batches, images.name, images.split, images.crop, keep))
