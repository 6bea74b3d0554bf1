"""The statistics that samples are compared with: from a file, or of images, computed once and remembered."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import PIL
import torch

from flowmaps.data import DataSet, Latents, iterate, open_dataset
from flowmaps.data.registry import builtin_name, check_source
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import UserError, blame
from flowmaps.files import cache_directory, npz_shapes
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.extractors import EXTRACTORS, INCEPTION_HASH, Extractor, load_extractor
from flowmaps.metrics.stats import REMEDY


def reference_stats(
    reference: str,
    extractor: str | None,
    weights: str | None,
    root: str,
    device: torch.device,
    keep: bool = False,
    team: Team = ALONE,
) -> tuple[FeatureStats, Extractor]:
    """Statistics of the reference, with single features if ``keep`` and there are any, and the extractor that fits.

    A statistics file decides the extractor; another one asked for by name is refused. Statistics of images are kept in
    the cache directory.
    """
    with blame("reference", reference):
        check_source(reference)
    shapes = npz_shapes(reference, REMEDY) if Path(reference).is_file() and reference.endswith(".npz") else {}
    images_alone = "mu" not in shapes and {"samples", "arr_0"} & shapes.keys()
    if images_alone or not reference.endswith((".npz", ".pkl")):
        images = open_for_scoring(reference, root, team=team)
        chosen = pick_extractor(extractor, weights, reference, device)
        return remembered(images, chosen, keep, team), chosen
    stats = FeatureStats.load(reference)
    wanted = stats.origin.extractor
    if extractor not in (None, wanted):
        raise UserError(f"--extractor={extractor}, but --reference={reference} was made with {wanted!r}")
    chosen = load_extractor(wanted, weights, device)
    if (
        wanted == "inception"
        and not stats.origin.weights
        and not chosen.origin.weights.startswith(INCEPTION_HASH)
        and not team.rank
    ):
        print(
            f"warning: --reference={reference} is a published file, made with the Inception of 2015; the weights in "
            "use are not torch-fidelity's port of it",
            file=sys.stderr,
        )
    if keep and "arr_0" in shapes:  # ADM's moments are of the whole data set, its images some of it
        stats.features = remembered(open_for_scoring(reference, root), chosen, keep, team).features
    return stats, chosen


def open_for_scoring(
    source: str, root: str, size: int | None = None, skip_corrupt: bool = False, team: Team = ALONE
) -> DataSet:
    """Open the data set ``source`` for scoring; an existing path is preferred to a name."""
    with team.first_alone():  # it checks all images of a folder, and the others find its cache
        path = Path(source)
        images = open_dataset(path if path.exists() else source, root=root, size=size, skip_corrupt=skip_corrupt)
    if isinstance(images, Latents):
        raise UserError(f"{source} holds no images (latents): give the images that they were made of")
    return images


def remembered(images: DataSet, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """The statistics of ``images``, taken from the cache if their content and the extractor are those of before.

    Only the first process of a ``team`` has them.
    """
    extractor.check_shape(images.shape)
    found, file, content = None, Path(), ""
    if not team.rank:
        content = images.content()
        key = [1, PIL.__version__, content, images.name, images.split, images.crop, vars(extractor.origin)]
        file = cache_directory() / "stats" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.npz"
        found = _read(file, keep)
    if team.told(found is not None):
        return found or FeatureStats(extractor.dim)
    stats = stats_of(images, extractor, keep, team)
    stats.origin = replace(stats.origin, content=content)
    if not team.rank:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stats.save(file)
        except OSError:  # only a memory: without it the next call computes again
            pass
    return stats


def source_stats(source: str, extractor: Extractor, root: str, flag: str) -> FeatureStats:
    """The statistics of the images that ``source`` names."""
    return remembered(open_for_scoring(source, root), extractor)


def _read(file: Path, keep: bool) -> FeatureStats | None:
    try:
        stats = FeatureStats.load(file)
    except UserError:  # none yet, or damaged
        return None
    return stats if stats.features is not None or not keep else None


def pick_extractor(name: str | None, weights: str | None, source: str, device: torch.device) -> Extractor:
    """The extractor ``name``, else the one made for the data set ``source``, else Inception."""
    data = (builtin_name(source) or ("",))[0]
    return load_extractor(name or (data if data in EXTRACTORS else "inception"), weights, device)


def stats_of(images: DataSet, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """Moments of the features of ``images``, each process of the ``team`` working on its share."""
    share = team.share(len(images))
    batches = (rows for rows, _ in iterate(images, share))
    return team.merged(extractor.stats(batches, images.name, images.split, images.crop, keep))
