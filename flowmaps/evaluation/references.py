"""The statistics that samples are compared with: from a file, or of images, computed once and remembered."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import PIL
import torch

from flowmaps.data.loader import in_order
from flowmaps.data.registry import Images, check_source, data_set, open_source
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import UserError
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
    check_source(reference, "--reference")
    shapes = npz_shapes(reference, REMEDY) if Path(reference).is_file() and reference.endswith(".npz") else {}
    images_alone = "mu" not in shapes and {"samples", "arr_0"} & shapes.keys()
    if images_alone or not reference.endswith((".npz", ".pkl")):
        images = open_source(reference, root, "--reference", team=team)
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
        stats.features = remembered(open_source(reference, root, "--reference"), chosen, keep, team).features
    return stats, chosen


def remembered(images: Images, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """The statistics of ``images``, taken from the cache if their content and the extractor are those of before.

    Only the first process of a ``team`` has them.
    """
    extractor.check_shape(images.data.shape)
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
    return remembered(open_source(source, root, flag), extractor)


def _read(file: Path, keep: bool) -> FeatureStats | None:
    try:
        stats = FeatureStats.load(file)
    except UserError:  # none yet, or damaged
        return None
    return stats if stats.features is not None or not keep else None


def pick_extractor(name: str | None, weights: str | None, source: str, device: torch.device) -> Extractor:
    """The extractor ``name``, else the one made for the data set ``source``, else Inception."""
    data = (data_set(source) or ("",))[0]
    return load_extractor(name or (data if data in EXTRACTORS else "inception"), weights, device)


def stats_of(images: Images, extractor: Extractor, keep: bool = False, team: Team = ALONE) -> FeatureStats:
    """Moments of the features of ``images``, each process of the ``team`` working on its share."""
    share = team.share(len(images.data))
    batches = (rows for rows, _ in in_order(images.data, share))
    return team.merged(extractor.stats(batches, images.name, images.split, images.crop, keep))
