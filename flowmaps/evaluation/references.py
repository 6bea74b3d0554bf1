"""References for scoring: statistics from a file, or of images, and the extractors that give such features."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flowmaps.data import DataSet
from flowmaps.data.registry import check_source
from flowmaps.distributed import ALONE, Team, pick_device
from flowmaps.errors import UserError, blame
from flowmaps.evaluation.real_images import built_in, cached_statistics, open_for_scoring
from flowmaps.flow_map import FlowMap
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.classifier import own_file
from flowmaps.metrics.extractors import (
    EXTRACTORS,
    Function,
    check_extractors,
    extractor_name,
    load_extractor,
    weights_of,
)
from flowmaps.metrics.features import Extractor
from flowmaps.metrics.published import INCEPTION_HASH
from flowmaps.metrics.scores import compares
from flowmaps.metrics.stored import REMEDY
from flowmaps.reading import npz_shapes
from flowmaps.vae import reduction


class Reference(NamedTuple):
    """Feature statistics to compare samples with, and the extractor that gives such features.

    Open it once with ``open_reference`` and pass it to any number of evaluations: nothing is computed twice.
    """

    stats: FeatureStats
    extractor: Extractor
    images: DataSet | None = None  # that the statistics are of, if they were at hand


Choice = str | Function  # of an extractor: its name, its file, "module:function" or a function


def open_reference(
    source: str | Path | FeatureStats,
    extractor: Choice | None = None,
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
        extractor: The feature extractor as ``metrics.extractors.load_extractor`` takes it. By default that of the
            statistics, of several the first, else the data set's own (for a folder, zip file or prepared set
            ``NAME.extractor.safetensors`` next to it), else ``"inception"``.
        weights: Weight file of the extractor, instead of the default one, or a folder that has it.
        root: Folder of the data set's files.
        device: Where the extractor runs; by default the accelerator if there is one.
        keep: Keep the features of single images too, for metrics that compare them.
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
    chosen = [] if extractor is None else [extractor]
    return open_references(source, chosen, weights, root, device=device, keep=keep, size=size, team=team)[0]


def open_references(
    source: str | Path | FeatureStats,
    extractors: Sequence[Choice] = (),
    weights: str | Path | None = None,
    root: str | Path = "data",
    *,
    device: torch.device | None = None,
    keep: bool = False,
    size: int | None = None,
    team: Team = ALONE,
) -> tuple[Reference, ...]:
    """Open what samples are compared with by several extractors, which see the images in one pass.

    Takes what ``open_reference`` takes. ``keep`` keeps only features that a metric compares one by one.
    """
    device = device or pick_device()
    check_extractors(extractors, weights)
    if isinstance(source, FeatureStats):
        loaded = _extractors_of([source], "statistics", extractors, weights, device)
        return (Reference(source, loaded[0]),)
    source = str(source)
    with blame("reference", source):
        check_source(source)
    names = _names(source)
    if names is None or ("mu" not in names and {"samples", "arr_0"} & names):
        images = open_for_scoring(source, root, size, team=team)  # refused before an extractor is downloaded
        loaded = load_extractors(extractors, weights, source, device, images.shape)
        found = cached_statistics(images, loaded, [keep and compares(extractor) for extractor in loaded], team)
        return tuple(Reference(stats, own, images) for stats, own in zip(found, loaded, strict=True))
    chosen: Sequence[Choice | None] = extractors or (None,)
    found = [FeatureStats.load(source, name and extractor_name(name)) for name in chosen]
    loaded = _extractors_of(found, source, extractors, weights, device)
    for stats, extractor in zip(found, loaded, strict=True):
        published = extractor.name == "inception" and not stats.origin.weights
        if published and not extractor.origin.weights.startswith(INCEPTION_HASH) and not team.rank:
            print(
                f"warning: reference={source} is a published file, made with the Inception of 2015; the weights in use "
                "are not torch-fidelity's port of it",
                file=sys.stderr,
            )
    if keep and "arr_0" in names:  # ADM's moments are of the complete data set, its images a part of it
        images = open_for_scoring(source, root)
        kept = [compares(extractor) for extractor in loaded]
        for stats, single in zip(found, cached_statistics(images, loaded, kept, team), strict=True):
            stats.features = single.features
    return tuple(Reference(stats, extractor) for stats, extractor in zip(found, loaded, strict=True))


def open_floor(
    source: str | Path,
    references: Sequence[Reference],
    root: str | Path = "data",
    *,
    keep: bool = False,
    size: int | None = None,
    team: Team = ALONE,
) -> tuple[Reference, ...]:
    """Open real images, or their statistics, with the extractors of ``references``; errors have the field "floor"."""
    loaded, source = [reference.extractor for reference in references], str(source)
    with blame("floor", source):
        check_source(source)
        images = None
        if "mu" in (_names(source) or ()):
            found = [FeatureStats.load(source, extractor.name) for extractor in loaded]
        else:
            images = open_for_scoring(source, root, size, team=team)
            found = cached_statistics(images, loaded, [keep and compares(each) for each in loaded], team)
    return tuple(Reference(stats, extractor, images) for stats, extractor in zip(found, loaded, strict=True))


def _names(source: str) -> set[str] | None:
    """Return the names of the arrays in a file; None of what is images: a folder, a zip file, a data set by name."""
    path = Path(source)
    if not path.is_file() or path.suffix == ".zip":
        return None
    return {"mu"} if path.suffix == ".pkl" else set(npz_shapes(source, REMEDY))


def _extractors_of(
    found: Sequence[FeatureStats],
    source: str,
    names: Sequence[Choice],
    weights: str | Path | None,
    device: torch.device,
) -> list[Extractor]:
    """Load the extractors that made statistics; refuse others."""
    loaded = []
    chosen: Sequence[Choice | None] = names or (None,)
    for stats, name in zip(found, chosen, strict=True):
        made_with = stats.origin.extractor
        if name is None and made_with not in EXTRACTORS:
            remedy = "give its file, or the function"
            raise UserError(f"{source} was made with the extractor {made_with!r}: {remedy}", field="extractor")
        if name is not None and extractor_name(name) != made_with:
            raise UserError(f"{source} was made with the extractor {made_with!r}", field="extractor", value=name)
        own = weights_of(name or made_with, weights, len(found) > 1)
        loaded.append(load_extractor(name or made_with, own, device, dim=stats.dim))
    return loaded


def load_extractors(
    names: Sequence[Choice], weights: str | Path | None, source: str, device: torch.device, shape: Sequence[int]
) -> list[Extractor]:
    """Load extractors for images of ``shape`` from ``source``, by default ``default_extractor``."""
    names = names or [default_extractor(source, weights)]
    several = len(names) > 1
    return [load_extractor(name, weights_of(name, weights, several), device, shape) for name in names]


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
