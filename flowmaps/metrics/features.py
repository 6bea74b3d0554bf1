"""A named feature function, and one pass of several over the same images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.metrics.stats import FeatureStats
from flowmaps.metrics.stored import Origin, pixels

POINTS = "checkerboard"
# The names that distances have in the literature; the others are called FD- and the extractor's name.
METRIC_OF = {"inception": "FID", "inception-spatial": "sFID", "dinov2": "FD-DINOv2", POINTS: "KL"}


@dataclass(frozen=True)
class Extractor:
    """A named feature function: ``embed`` maps uint8 images [n, C, H, W], or points, to features [n, dim]."""

    embed: Callable[[Tensor], Tensor]
    dim: int
    origin: Origin  # extractor name, weight hash, resize
    logits: Callable[[Tensor], Tensor] | None = None  # class logits [n, classes] of features, for the Inception Score
    cached: bool = True  # name and hash say all: its statistics of a set may be kept for later calls

    @property
    def name(self) -> str:
        """Its name in tables and files."""
        return self.origin.extractor

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance on these features; KL for points, which have a better score."""
        return METRIC_OF.get(self.name, f"FD-{self.name}")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse points, except for the one extractor that takes only points."""
        if (len(shape) == 3) == (self.name == POINTS):
            kind = "images, not points" if len(shape) == 3 else "points, not images"
            raise UserError(
                f"does not take samples of shape {tuple(shape)}: they are {kind}", field="extractor", value=self.name
            )

    def stats(
        self, batches: Iterable[Tensor], data: str = "", split: str = "", crop: str = "", keep: bool = False
    ) -> FeatureStats:
        """Return the moments of the features of uint8 image batches, streamed; ``keep`` also keeps the features."""
        return extract([self], batches, [keep], data, split, crop)[0]


@torch.no_grad()
def extract(
    extractors: Sequence[Extractor],
    batches: Iterable[Tensor],
    keep: Sequence[bool],
    data: str = "",
    split: str = "",
    crop: str = "",
) -> list[FeatureStats]:
    """Return the moments of each extractor's features of the same images, streamed in one pass.

    Args:
        extractors: The feature functions.
        batches: uint8 images [n, C, H, W], or points; each batch is used by all extractors, then dropped.
        keep: For each extractor, keep the features too.
        data: Name of the images' data set in the origin of the statistics.
        split: The split.
        crop: How the images got their size.

    Raises:
        UserError: The images differ in size, or an extractor does not take them.
    """
    found = [
        FeatureStats(extractor.dim, replace(extractor.origin, data=data, split=split, crop=crop), kept)
        for extractor, kept in zip(extractors, keep, strict=True)
    ]
    for images in batches:
        size = pixels(*images.shape[2:]) if images.ndim == 4 else ""
        for extractor, stats in zip(extractors, found, strict=True):
            extractor.check_shape(images.shape[1:])
            if stats.n and size != stats.origin.size:
                raise UserError(f"images of {stats.origin.size} and of {size} pixels: crop and resize them to one size")
            stats.origin = replace(stats.origin, size=size)
            stats.update(extractor.embed(images))
    return found
