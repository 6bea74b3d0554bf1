"""Scoring: from a source of images to statistics and distances, with a record of all that moves the number."""

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import flowmaps
from flowmaps import FlowMap, UserError
from flowmaps.files import read_npz
from flowmaps.images import to_uint8
from flowmaps.latents import fingerprint
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.extractors import CLASSIFIERS, Extractor, load_extractor
from flowmaps.metrics.neighbours import memorisation
from training.data import (
    DATA,
    ArrayData,
    DataSet,
    PreparedImages,
    in_order,
    load_arrays,
    load_data,
    open_images,
    prepared,
)
from training.outputs import pick_device


class NotFinite(UserError):
    """A model's samples hold NaN or infinity."""


def check_source(source: str, flag: str) -> None:
    """Refuse a source that is nothing at all, before any slow work."""
    if not is_data_set(source) and not Path(source).exists():
        raise UserError(f"{flag}={source}: no such file or folder, and no data set ({', '.join(DATA)})")


def is_data_set(source: str) -> bool:
    """Whether ``source`` is NAME or NAME:split of a known data set (and no such file exists)."""
    return source.partition(":")[0] in DATA and not Path(source).exists()


def image_batches(
    source: str, root: str, flag: str, size: int | None = None, skip_corrupt: bool = False
) -> Iterator[Tensor]:
    """uint8 images [b, C, H, W] of a data set NAME[:split], a folder or zip of images, or an .npz of sample.py.

    Images of a folder or zip are cropped and resized to ``size``; without it they must have one shape.
    """
    path = Path(source)
    if is_data_set(source):
        name, _, split = source.partition(":")
        data: DataSet = load_arrays(name, split or "train", root)
        if len(data.shape) != 3:
            raise UserError(f"{flag}={source} holds points, not images: features need images")
    elif prepared(path):
        data = load_data("prepared", source)
        if not isinstance(data, PreparedImages):
            raise UserError(f"{flag}={source} holds latents, not images: give the images that they were made of")
    elif path.is_dir() or path.suffix == ".zip":
        data = open_images(path, size, skip_corrupt)
    else:
        check_source(source, flag)
        data = ArrayData(_archive(path, flag))
    return (images for images, _ in in_order(data))


def _archive(file: Path, flag: str) -> Tensor:
    arrays = read_npz(file, f"{flag} takes what sample.py wrote")
    array = arrays.get("samples", arrays.get("arr_0"))
    if array is None:
        raise UserError(f"{flag}={file} has neither 'samples' nor 'arr_0': sample.py writes samples-N.npz")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UserError(f"{flag}={file}: images must be uint8 [n, h, w, 1 or 3], got {array.dtype} {array.shape}")
    return rearrange(torch.from_numpy(array), "n h w c -> n c h w")


def pick_extractor(name: str | None, weights: str | None, source: str, device: torch.device) -> Extractor:
    """The extractor ``name``, else the one made for the data set ``source``, else Inception."""
    data = source.partition(":")[0]
    return load_extractor(name or (data if data in CLASSIFIERS else "inception"), weights, device)


def reference_stats(
    reference: str, extractor: str | None, weights: str | None, root: str, device: torch.device
) -> tuple[FeatureStats, Extractor]:
    """Statistics of the reference, and the extractor that fits them.

    A statistics file decides the extractor; another one asked for by name is refused.
    """
    check_source(reference, "--reference")
    if Path(reference).is_file() and _has_moments(reference):
        stats = FeatureStats.load(reference)
        wanted = stats.origin.extractor
        if extractor not in (None, wanted):
            raise UserError(f"--extractor={extractor}, but --reference={reference} was made with {wanted!r}")
        return stats, load_extractor(wanted, weights, device)
    chosen = pick_extractor(extractor, weights, reference, device)
    return source_stats(reference, chosen, root, "--reference"), chosen


def _has_moments(file: str) -> bool:
    """Whether an .npz is meant as statistics: all but those of images."""
    return not {"samples", "arr_0"} & set(read_npz(file, "make reference statistics with stats.py"))


def source_stats(
    source: str, extractor: Extractor, root: str, flag: str, size: int | None = None, skip_corrupt: bool = False
) -> FeatureStats:
    """Moments of the features of a source of images."""
    name, _, split = source.partition(":") if is_data_set(source) else (Path(source).name, "", "")
    split = split or ("train" if is_data_set(source) else "")
    return extractor.stats(image_batches(source, root, flag, size, skip_corrupt), name, split)


def generated(batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    """Generated samples as uint8 images, rounded once and never written; a model that gives NaN is refused."""
    for x, _ in batches:
        if x.ndim != 4:
            raise UserError(f"samples of shape {tuple(x.shape[1:])} are points, not images: features need images")
        if not bool(torch.isfinite(x).all()):
            raise NotFinite("the model's samples hold NaN or infinity: nothing to score")
        yield to_uint8(x)


def floor(data: str, extractor: Extractor, root: str) -> float:
    """The distance between a data set's training and held-out images: what a perfect model would score."""
    train, heldout = (source_stats(f"{data}:{split}", extractor, root, "--reference") for split in ("train", "heldout"))
    return frechet_distance(train, heldout)


def neighbours(images: Tensor, data: str, root: str) -> dict[str, float]:
    """Nearest-neighbour distances between uint8 ``images`` and both splits of a small data set, as a row of results."""
    pixels = [load_arrays(data, split, root).x.float() / 127.5 for split in ("train", "heldout")]
    found = memorisation(images.float().cpu() / 127.5, *pixels)
    return {**vars(found), "memorisation_ratio": found.ratio}


def record(stats: FeatureStats, extractor: Extractor, fm: FlowMap | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Every fact that moves the number, for the JSON record; ``results`` is to be filled."""
    from importlib.metadata import version

    model = {} if fm is None else {k: getattr(fm.info, k) for k in ("data", "kind", "ema", "images_seen", "guidance")}
    if fm is not None:
        model |= {"interpolant": fm.interpolant_name, "base_std": fm.base_std}
    if fm is not None and fm.info.latent_scale:
        decoder = fm.open_decoder()
        model["vae"] = {"source": decoder.source, "sha256": fingerprint(decoder.open()), "dtype": str(decoder.dtype)}
    packages = {name: version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")}
    return {
        "metric": extractor.metric,
        "extractor": {k: getattr(extractor.origin, k) for k in ("extractor", "weights", "resize")},
        "reference": {"data": stats.origin.data, "split": stats.origin.split, "n": stats.n, "sha256": stats.sha256()},
        "model": model,
        **facts,
        "device": str(pick_device()),
        "versions": {"flowmaps": flowmaps.__version__, "python": platform.python_version(), **packages},
        "results": [],
    }


def table(results: list[dict[str, Any]]) -> str:
    """A plain table of results, columns as the first row has them."""
    columns = list(results[0])
    cells = [columns, *[[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in results]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
