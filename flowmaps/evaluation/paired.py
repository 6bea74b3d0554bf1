"""Paired distances: samples of a model with a condition against the pictures that they stand for."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps.data import DataSet
from flowmaps.distributed import Team, pick_device
from flowmaps.errors import UserError, blame
from flowmaps.evaluation.real_images import open_for_scoring
from flowmaps.images import from_uint8
from flowmaps.metrics.lpips import lpips

HIGHEST = 100.0  # dB, of equal images, whose ratio is infinite


def open_pairs(
    pairs: str | Path | DataSet, root: str | Path, shape: tuple[int, ...], num: int, weights: str, team: Team
) -> "Pairs":
    """Open the pictures that ``num`` samples of ``shape`` are compared with; errors name ``pairs``."""
    with blame("pairs", str(pairs)):
        data = open_for_scoring(pairs, root, team=team) if isinstance(pairs, str | Path) else pairs
        return Pairs(data, shape, team.split(num), weights, pick_device())


class Pairs:
    """Compares sample i with item i mod n of ``data``, while the samples pass by.

    Args:
        data: Images of the samples' shape.
        items: The samples that this process makes, in their order.
        weights: Directory of LPIPS's weights (``metrics.lpips.FILES``); empty leaves LPIPS out.
        device: Where LPIPS runs.

    Raises:
        UserError: The images are of another shape.
    """

    def __init__(self, data: DataSet, shape: tuple[int, ...], items: range, weights: str, device: torch.device) -> None:
        if shape and tuple(data.shape) != tuple(shape):
            raise UserError(f"has images of shape {tuple(data.shape)}, the samples {tuple(shape)}")
        self.data, self.items, self.sums = data, items, dict.fromkeys(["PSNR", *["LPIPS"] * bool(weights)], 0.0)
        self.distance = lpips(weights, device) if weights else None
        self.device, self.count = device, 0

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 ``batches`` of the items in their order, compared."""
        first = self.items.start
        for images in batches:
            index = torch.arange(first, first + len(images)) % len(self.data)
            true = self.data.fetch(index)[0]
            error = (images.cpu().double() - true.double()).square().flatten(1).mean(dim=1) / 255**2
            self.sums["PSNR"] += float((-10 * error.clamp(min=10 ** (-HIGHEST / 10)).log10()).sum())
            if self.distance is not None:
                with torch.no_grad():
                    found = self.distance(*(from_uint8(x.to(self.device)) for x in (images, true)))
                self.sums["LPIPS"] += float(found.sum())
            first, self.count = first + len(images), self.count + len(images)
            yield images

    def scores(self, team: Team) -> dict[str, Any]:
        """Return the means over all samples of all processes, PSNR in dB, and start anew; empty but for the first."""
        found = team.all_gather(torch.tensor([[self.count, *self.sums.values()]], dtype=torch.float64))
        count, *sums = found.sum(dim=0).tolist()
        names, self.count, self.sums = list(self.sums), 0, dict.fromkeys(self.sums, 0.0)
        return {} if team.rank else {name: total / count for name, total in zip(names, sums, strict=True)}
