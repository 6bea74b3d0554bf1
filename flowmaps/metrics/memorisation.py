"""Has a small training set been memorised? Distances to nearest neighbours tell."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = "donot_use_mm_for_euclid_dist"  # the faster way rounds small distances


@dataclass(frozen=True)
class Memorisation:
    """Medians of root-mean-square pixel distances (images in [-1, 1]) to the nearest neighbour in a set.

    A model that copies its training images has ``samples_to_train`` far below ``heldout_to_train``; one that has
    learnt the distribution has them alike (``ratio`` about 1).
    """

    samples_to_train: float
    samples_to_heldout: float
    heldout_to_train: float

    @property
    def ratio(self) -> float:
        """samples_to_train / heldout_to_train: far below 1 means memorised."""
        return self.samples_to_train / self.heldout_to_train


def nearest(a: Tensor, b: Tensor, batch: int = 1000) -> Tensor:
    """Root-mean-square distance of each of ``a`` [n, ...] to its nearest in ``b`` [m, ...]: [n]."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    rows = [torch.cdist(part, b, compute_mode=EXACT).amin(dim=1) for part in torch.split(a, batch)]
    distance: Tensor = torch.cat(rows) / a.shape[1] ** 0.5
    return distance


def memorisation(samples: Tensor, train: Tensor, heldout: Tensor) -> Memorisation:
    """Compare ``samples`` with the sets they should (held out) and should not (train) be especially close to."""
    pairs = ((samples, train), (samples, heldout), (heldout, train))
    return Memorisation(*(nearest(a, b).median().item() for a, b in pairs))
