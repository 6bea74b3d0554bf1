"""Real images for scoring: opened by name or path, and their statistics, computed once and cached.

Every call into ``flowmaps.data`` by name or path from the scoring code is in this module.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import PIL
import torch
from torch import Tensor

from flowmaps.data import ArrayData, DataSet, Latents, iterate, open_dataset
from flowmaps.data.registry import builtin_name, check_source
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import UserError, blame
from flowmaps.evaluation.samples import RECORD
from flowmaps.files import cache_directory
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.features import Extractor, extract
from flowmaps.metrics.memorisation import Memorisation, memorisation
from flowmaps.metrics.stored import REMEDY
from flowmaps.reading import npz_shapes

NO_SPLIT = (
    "needs a data set with a held-out split as reference, such as digits:heldout, or the images of the training as "
    "reference and held-out ones as floor"
)


def built_in(source: str) -> str:
    """Return the name of the built-in data set that ``source`` (NAME or NAME:split) names, else an empty string."""
    known = builtin_name(source)
    return known[0] if known else ""


def cached_stats(images: DataSet, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """Return the statistics of ``images``, from the cache if their content and the extractor are the same as before.

    Only the first process of a ``team`` has them.
    """
    return cached_statistics(images, [extractor], [keep], team)[0]


def cached_statistics(
    images: DataSet, extractors: Sequence[Extractor], keep: Sequence[bool], team: Team = ALONE
) -> list[FeatureStats]:
    """Return what ``cached_stats`` returns for each extractor; those that are missing are computed in one pass."""
    for extractor in extractors:
        extractor.check_shape(images.shape)
    known: dict[int, FeatureStats] = {}
    content = "" if team.rank else images.content()
    for i, extractor in enumerate(extractors):
        stats = None if team.rank or not extractor.cached else _read(_cache_file(images, content, extractor), keep[i])
        if team.broadcast(stats is not None):
            known[i] = stats or FeatureStats(extractor.dim)
    missing = [i for i in range(len(extractors)) if i not in known]
    if missing:
        batches = (rows for rows, _ in iterate(images, team.split(len(images))))
        own = [extractors[i] for i in missing]
        made = extract(own, batches, [keep[i] for i in missing], images.name, images.split, images.crop)
        for i, share in zip(missing, made, strict=True):
            known[i] = stats = team.all_reduce_stats(share)
            stats.origin = replace(stats.origin, content=content)
            if not team.rank and extractors[i].cached:
                with suppress(OSError):  # the cache is optional: without it the next call computes again
                    stats.save(_cache_file(images, content, extractors[i]), check=False)
    return [known[i] for i in range(len(extractors))]


def _cache_file(images: DataSet, content: str, extractor: Extractor) -> Path:
    key = [1, PIL.__version__, content, images.name, images.split, images.crop, vars(extractor.origin)]
    return cache_directory() / "stats" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.npz"


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
        look = {"size": size, "skip_corrupt": skip_corrupt, "fit": fit, "background": background}
        images = open_dataset(path if path.exists() else source, root=root, **look)  # type: ignore[arg-type]
    if isinstance(images, Latents):
        raise UserError(f"{source} holds latents, not images: pass the images that they were made from")
    return images


def seen_and_unseen(
    reference: DataSet | None, floor: DataSet | None, root: str | Path = "data"
) -> tuple[DataSet, DataSet]:
    """Return the images that a model was trained on and others like them, to tell whether it copies.

    They are the splits of a built-in data set, else ``reference`` and ``floor``.
    """
    if reference is not None and reference.split:
        train, heldout = (open_dataset(reference.name, split, root=root) for split in ("train", "heldout"))
        return train, heldout
    if reference is None or floor is None:
        raise UserError(NO_SPLIT, field="memorisation")
    return reference, floor


def train_set_score(train: DataSet, heldout: DataSet, extractor: Extractor) -> float:
    """Return the distance between training and held-out images: the score of a perfect model."""
    return frechet_distance(cached_stats(train, extractor), cached_stats(heldout, extractor))


def nearest_neighbours(images: Tensor, train: DataSet, heldout: DataSet) -> Memorisation:
    """Return nearest-neighbour distances between uint8 ``images`` and those of a small data set."""
    return memorisation(images.float().cpu() / 127.5, _pixels(train), _pixels(heldout))


def _pixels(images: DataSet) -> Tensor:
    return torch.cat([x for x, _ in iterate(images)]).float() / 127.5
