"""Scoring generated images, with a record of all that moves the number."""

import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import flowmaps
from flowmaps import FlowMap, UserError
from flowmaps.data import iterate, open_dataset
from flowmaps.distributed import ALONE, Team, pick_device
from flowmaps.evaluation.references import source_stats
from flowmaps.images import to_uint8
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.extractors import Extractor
from flowmaps.metrics.memorisation import memorisation
from flowmaps.metrics.scores import check_metrics, check_reference, needs_features, scores
from flowmaps.metrics.stats import check_comparable, pixels
from flowmaps.vae import fingerprint

Row = dict[str, Any]


class NotFinite(UserError):
    """A model's samples hold NaN or infinity."""


def generated(batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    """Generated points, or uint8 images, rounded once and never written; a model that gives NaN is refused."""
    for x, _ in batches:
        if not bool(torch.isfinite(x).all()):
            raise NotFinite("the model's samples hold NaN or infinity: nothing to score")
        yield to_uint8(x) if x.ndim == 4 else x


@dataclass(frozen=True)
class Scorer:
    """Scores images against one reference; the processes of a team make shares of them, and the first one scores."""

    extractor: Extractor
    reference: FeatureStats
    metrics: Sequence[str]
    kid_subset: int
    team: Team = ALONE

    def check(self, num: int, shape: tuple[int, ...]) -> None:
        """Refuse, before any slow work, ``num`` images of ``shape`` (if known) that could not be scored."""
        if shape:
            self.extractor.check_shape(shape)
        check_metrics(self.metrics, self.extractor, num, self.kid_subset)
        if not self.team.rank:
            origin = replace(self.extractor.origin, size=pixels(*shape[1:]) if len(shape) == 3 else "")
            check_comparable(FeatureStats(self.extractor.dim, origin), self.reference)
            check_reference(self.metrics, self.reference, self.kid_subset)

    def __call__(self, samplings: Iterable[Iterable[Tensor]]) -> Row:
        """Mean of each score over repeated samplings, with half the range and the scores of each if there are several.

        A sampling is this process's share of uint8 image batches. Processes but the first get an empty row.
        """
        every = []
        for share in samplings:
            mine = self.extractor.stats(share, keep=needs_features(self.metrics))
            stats = self.team.merged(mine)
            if not self.team.rank:
                every.append(
                    scores(stats, self.reference, self.extractor, self.metrics, self.kid_subset, pick_device())
                )
        if not every:
            return {}
        over = {name: [found[name] for found in every] for name in every[0]}
        row: Row = {name: statistics.mean(values) for name, values in over.items()}
        if len(every) > 1:
            row["spread"] = {name: (max(values) - min(values)) / 2 for name, values in over.items()}
            row["repeats"] = every
        return row


def floor(data: str, extractor: Extractor, root: str) -> float:
    """The distance between a data set's training and held-out images: what a perfect model would score."""
    train, heldout = (source_stats(f"{data}:{split}", extractor, root, "--reference") for split in ("train", "heldout"))
    return frechet_distance(train, heldout)


def neighbours(images: Tensor, data: str, root: str) -> dict[str, float]:
    """Nearest-neighbour distances between uint8 ``images`` and both splits of a small data set, as a row of results."""
    splits = (open_dataset(data, split, root=root) for split in ("train", "heldout"))
    pixels = [torch.cat([x for x, _ in iterate(split)]).float() / 127.5 for split in splits]
    found = memorisation(images.float().cpu() / 127.5, *pixels)
    return {**vars(found), "memorisation_ratio": found.ratio}


def record(reference: FeatureStats, extractor: Extractor, fm: FlowMap | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Every fact that moves the number, for the JSON record; ``results`` are to be added."""
    model = {} if fm is None else {k: getattr(fm.info, k) for k in ("data", "kind", "ema", "images_seen", "guidance")}
    if fm is not None:
        model |= {"interpolant": fm.interpolant_name, "base_std": fm.base_std}
    if fm is not None and fm.info.latent_scale:
        decoder = fm.open_decoder()
        model["vae"] = {"source": decoder.source, "sha256": fingerprint(decoder.open()), "dtype": str(decoder.dtype)}
    packages = {name: version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")}
    origin = reference.origin
    return {
        "metric": extractor.metric,
        "extractor": {k: getattr(extractor.origin, k) for k in ("extractor", "weights", "resize")},
        "reference": {k: getattr(origin, k) for k in ("data", "split", "size", "crop", "content", "weights")}
        | {"n": reference.n, "sha256": reference.sha256()},
        "model": model,
        **facts,
        "command": " ".join(sys.argv),
        "device": str(pick_device()),
        "versions": {"flowmaps": flowmaps.__version__, "python": platform.python_version(), **packages},
    }


HIDDEN = {"weights", "times", "spread", "repeats"}  # facts of a row that a table has no room for


def table(results: list[Row]) -> str:
    """A Markdown table of results, columns as the first row has them; mean ± half the range of repeated scores."""
    columns = [name for name in results[0] if name not in HIDDEN]
    cells = [columns, *[[_cell(row, name) for name in columns] for row in results]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def _cell(row: Row, name: str) -> str:
    text = f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
    return f"{text} ± {row['spread'][name]:.2g}" if name in row.get("spread", {}) else text
