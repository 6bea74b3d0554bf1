"""What a run looks at while it trains."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from flowmaps import FlowMap
from flowmaps.generate import generate
from flowmaps.images import sample_grid, to_pil
from samplers import uniform_times


def samples(fm: FlowMap, steps: int, n: int, seed: int, sampler: str | None = None) -> Tensor:
    """``n`` samples with ``steps`` uniform steps: by the map, or by Euler's method if ``fm`` is a drift."""
    sampler = sampler or ("map" if fm.info.kind == "map" else "euler")
    return torch.cat([x for x, _ in generate(fm, uniform_times(steps), n, seed, sampler=sampler)])


def grid_image(fm: FlowMap, steps: Sequence[int], seed: int) -> Image.Image:
    """A picture of the same noise carried to data in different step counts, one row each."""
    n = 16 if len(fm.info.shape) == 3 else 8192  # points are drawn as a density
    return to_pil(sample_grid([samples(fm, count, n, seed) for count in steps]))
