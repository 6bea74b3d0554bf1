"""References for scoring: statistics from a file, or of images, computed once and cached.

Every call into ``flowmaps.data`` by name or path from the scoring code is in this module.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import PIL
import torch
from torch import Tensor

from flowmaps.data import ArrayData, DataSet, Latents, iterate, open_dataset
from flowmaps.data.registry import builtin_name, check_source
from flowmaps.distributed import ALONE, Team, pick_device
from flowmaps.errors import UserError, blame
from flowmaps.evaluation.samples import RECORD
from flowmaps.files import cache_directory
from flowmaps.flow_map import FlowMap
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.classifier import own_file
from flowmaps.metrics.extractors import (
    EXTRACTORS,
    INCEPTION_HASH,
    Extractor,
    check_extractor,
    extractor_name,
    load_extractor,
)
from flowmaps.metrics.memorisation import Memorisation, memorisation
from flowmaps.metrics.stats import REMEDY, frechet_distance
from flowmaps.reading import npz_shapes
from flowmaps.vae import reduction


class Reference(NamedTuple):
    """Feature statistics to compare samples with, and the extractor that gives such features.

    Open it once with ``open_reference`` and pass it to any number of evaluations: nothing is computed twice.
    """

    stats: FeatureStats
    extractor: Extractor
    data: str = ""  # the built-in data set that the images are from, if any: it has a held-out split


def open_reference(
    source: str | Path | FeatureStats,
    extractor: str | None = None,
    weights: str | Path | None = None,
    root: str | Path = "data",
    *,
    device: torch.device | None = None,
    keep: bool = False,
    size: int | None = None,
    team: Team = ALONE,
) -> Reference:
    """Open what samples are compared with.

    Args:
        source: A data set ``NAME[:split]``, a folder or zip of images, an .npz of images, a statistics file (of
            ``FeatureStats.save``, EDM, EDM2 or ADM), or statistics. Those of images are kept in the cache directory.
        extractor: Name of the feature extractor, or its file. By default that of the statistics, else the data set's
            own (for a folder, zip file or prepared set ``NAME.extractor.safetensors`` next to it), else
            ``"inception"``.
        weights: Weight file of the extractor, instead of the default one.
        root: Folder of the data set's files.
        device: Where the extractor runs; by default the accelerator if there is one.
        keep: Keep the features of single images too, for KID, precision and recall.
        size: Crop the images of a folder or zip file to squares of this many pixels, as training does; None leaves
            them as they are.
        team: The processes that share the work; only the first one then has the statistics.

    Returns:
        The statistics and the extractor.

    Raises:
        UserError: The source is missing or damaged, or its statistics are from another extractor.

    Example:
        >>> stats, extractor, _ = open_reference("digits:heldout")
        >>> stats.n, extractor.metric
        (449, 'FD-digits')
    """
    device = device or pick_device()
    if isinstance(source, FeatureStats):
        return Reference(source, _extractor_of(source, "statistics", extractor, weights, device))
    source = str(source)
    check_extractor(extractor, weights)
    with blame("reference", source):
        check_source(source)
    path, names = Path(source), set[str]()
    is_archive = path.is_file() and path.suffix != ".zip"
    if is_archive and path.suffix != ".pkl":
        names = set(npz_shapes(source, REMEDY))
    if not is_archive or ("mu" not in names and {"samples", "arr_0"} & names):
        images = open_for_scoring(source, root, size, team=team)  # refused before an extractor is downloaded
        chosen = pick_extractor(extractor, weights, source, device)
        return Reference(cached_stats(images, chosen, keep, team), chosen, built_in(source))
    stats = FeatureStats.load(source)
    chosen = _extractor_of(stats, source, extractor, weights, device)
    published = chosen.origin.extractor == "inception" and not stats.origin.weights
    if published and not chosen.origin.weights.startswith(INCEPTION_HASH) and not team.rank:
        print(
            f"warning: reference={source} is a published file, made with the Inception of 2015; the weights in use are "
            "not torch-fidelity's port of it",
            file=sys.stderr,
        )
    if keep and "arr_0" in names:  # ADM's moments are of the complete data set, its images a part of it
        images = open_for_scoring(source, root)
        stats.features = cached_stats(images, chosen, keep, team).features
    return Reference(stats, chosen)


def _extractor_of(
    stats: FeatureStats, source: str, name: str | None, weights: str | Path | None, device: torch.device
) -> Extractor:
    """Load the extractor that made ``stats``; refuse another one."""
    made_with = stats.origin.extractor
    if name is None and made_with not in EXTRACTORS:
        raise UserError(f"{source} was made with the extractor {made_with!r}: give its file", field="extractor")
    if name is not None and extractor_name(name) != made_with:
        raise UserError(f"{source} was made with the extractor {made_with!r}", field="extractor", value=name)
    return load_extractor(name or made_with, weights, device)


def built_in(source: str) -> str:
    """Return the name of the built-in data set that ``source`` (NAME or NAME:split) names, else an empty string."""
    known = builtin_name(source)
    return known[0] if known else ""


def pick_extractor(name: str | None, weights: str | Path | None, source: str, device: torch.device) -> Extractor:
    """Load the extractor ``name``, a name or a file, by default ``default_extractor``."""
    return load_extractor(name or default_extractor(source, weights), weights, device)


def default_extractor(source: str, weights: str | Path | None = None) -> str:
    """Return the name of the extractor made for the data set ``source``, or its file; else Inception.

    Given ``weights`` are those of a named one.
    """
    if data := built_in(source):
        return data if data in EXTRACTORS else "inception"
    own = own_file(source)
    return str(own) if weights is None and own.is_file() else "inception"


def model_size(fm: FlowMap) -> int | None:
    """Return height and width of a model's images, decoded ones for latents; None for points."""
    if len(fm.info.shape) != 3:
        return None
    return fm.info.shape[-1] * (reduction(fm.open_decoder().open()) if fm.info.latent_scale else 1)


def cached_stats(images: DataSet, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """Return the statistics of ``images``, from the cache if their content and the extractor are the same as before.

    Only the first process of a ``team`` has them.
    """
    extractor.check_shape(images.shape)
    found, file, content = None, Path(), ""
    if not team.rank:
        content = images.content()
        key = [1, PIL.__version__, content, images.name, images.split, images.crop, vars(extractor.origin)]
        file = cache_directory() / "stats" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.npz"
        found = _read(file, keep)
    if team.broadcast(found is not None):
        return found or FeatureStats(extractor.dim)
    batches = (rows for rows, _ in iterate(images, team.split(len(images))))
    stats = team.all_reduce_stats(extractor.stats(batches, images.name, images.split, images.crop, keep))
    stats.origin = replace(stats.origin, content=content)
    if not team.rank:
        try:
            stats.save(file, check=False)
        except OSError:  # the cache is optional: without it the next call computes again
            pass
    return stats


def _read(file: Path, keep: bool) -> FeatureStats | None:
    try:
        stats = FeatureStats.load(file)
    except UserError:  # none yet, or damaged
        return None
    return stats if stats.features is not None or not keep else None


def source_stats(source: str, extractor: Extractor, root: str | Path = "data") -> FeatureStats:
    """Return the statistics of the images that ``source`` names."""
    return cached_stats(open_for_scoring(source, root), extractor)


def open_images(images: Tensor | str | Path | DataSet, root: str | Path = "data", team: Team = ALONE) -> DataSet:
    """Open images to be scored: uint8 [n, C, H, W] (points: float [n, dim]), a path, or a data set (by name too)."""
    if isinstance(images, Tensor):
        if images.ndim != 2 and (images.ndim != 4 or images.dtype != torch.uint8):
            found = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"images to score must be uint8 [n, C, H, W] (see flowmaps.images.to_uint8), got {found}")
        return ArrayData(images)
    if isinstance(images, str | Path):
        with blame("samples", images):
            check_source(images)
            _refuse_steered(Path(images))
        return open_for_scoring(images, root, team=team)
    return images


def _refuse_steered(file: Path) -> None:
    """Refuse an archive of samples that a model did not make alone: a score would pass for the model's."""
    if file.suffix == ".npz" and file.is_file() and RECORD in npz_shapes(file, REMEDY):
        raise UserError(
            "these samples were steered, or made of a picture (its record says how), so that their distance is not a "
            "score of the model: to measure them as images, give their folder steps-N"
        )


def open_for_scoring(
    source: str | Path,
    root: str | Path,
    size: int | None = None,
    skip_corrupt: bool = False,
    fit: str = "crop",
    background: str = "white",
    team: Team = ALONE,
) -> DataSet:
    """Open the data set ``source`` for scoring by ``open_dataset``; an existing path is preferred to a name."""
    with team.main_process_first():  # it checks all images of a folder, and the others find its cache
        path = Path(source)
        images = open_dataset(
            path if path.exists() else source,
            root=root,
            size=size,
            skip_corrupt=skip_corrupt,
            fit=fit,
            background=background,
        )
    if isinstance(images, Latents):
        raise UserError(f"{source} holds latents, not images: pass the images that they were made from")
    return images


def train_set_score(data: str, extractor: Extractor, root: str | Path = "data") -> float:
    """Return the distance between a data set's training and held-out images: the score of a perfect model."""
    train, heldout = (source_stats(f"{data}:{split}", extractor, root) for split in ("train", "heldout"))
    return frechet_distance(train, heldout)


def nearest_neighbours(images: Tensor, data: str, root: str | Path = "data") -> Memorisation:
    """Return nearest-neighbour distances between uint8 ``images`` and both splits of a small data set."""
    train, heldout = (_pixels(open_dataset(data, split, root=root)) for split in ("train", "heldout"))
    return memorisation(images.float().cpu() / 127.5, train, heldout)


def _pixels(images: DataSet) -> Tensor:
    return torch.cat([x for x, _ in iterate(images)]).float() / 127.5
