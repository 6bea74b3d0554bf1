"""Distances between point clouds in the plane."""

import math

import torch
from torch import Tensor

from flowmaps.rng import generator


def sliced_w2(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between point sets [n, dim] and [n, dim] of the same size.

    Root of the mean over random unit directions of the squared one-dimensional W2, which pairs sorted projections.
    In the unit of the coordinates; between two true samples of n points it is about 1/sqrt(n), not 0.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced_w2 compares samples of equal size, got {tuple(a.shape)} and {tuple(b.shape)}")
    g = generator(seed, "projections", 0)
    direction = torch.randn(a.shape[1], projections, generator=g, dtype=torch.float64)
    direction = direction / direction.norm(dim=0)
    sorted_a, sorted_b = ((x.cpu().double() @ direction).sort(dim=0).values for x in (a, b))
    return math.sqrt((sorted_a - sorted_b).square().mean().item())


def board_kl(samples: Tensor, bins: int = 48, pseudo_count: float = 0.5) -> float:
    """KL(data || model) in nats for the 4 x 4 checkerboard on [-1, 1]^2 and model samples [n, 2].

    The data density is exact: 1/2 on the even squares, integrated over each cell of a ``bins`` x ``bins`` grid (a
    multiple of 4, so that no cell straddles an edge of the board). The model's is the histogram of the samples with
    ``pseudo_count`` added to each cell and to one more for what lies outside. Even true samples score above 0: state
    that floor next to the number.
    """
    if bins % 4:
        raise ValueError(f"bins must be a multiple of 4 so that cells do not straddle board edges, got {bins}")
    cell = ((samples.cpu().double() + 1) / 2 * bins).floor().long()
    inside = ((cell >= 0) & (cell < bins)).all(dim=1)
    count = torch.bincount(cell[inside, 0] * bins + cell[inside, 1], minlength=bins**2).double()
    model = (count + pseudo_count) / (len(samples) + pseudo_count * (bins**2 + 1))
    square = torch.arange(bins) // (bins // 4)
    even = ((square[:, None] + square[None, :]) % 2 == 0).flatten()
    data = 1 / even.sum().double()  # the same in every cell of the support
    return (data * (data / model[even]).log()).sum().item()
