"""Moments of features, and the Fréchet distance between two sets of them."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import read_npz, write_file


@dataclass(frozen=True)
class Origin:
    """Where features came from: two sets are comparable only if extractor, weights and resize agree."""

    extractor: str = ""
    weights: str = ""  # SHA-256 of the extractor's weight file
    resize: str = ""  # what happens to an image before the extractor sees it
    data: str = ""
    split: str = ""


class FeatureStats:
    """Mean and covariance of features, in float64, fed batch by batch and merged in any order.

    Holds n, the mean and the scatter matrix sum (f - mean)(f - mean)^T; batches are combined by the pairwise update of
    Chan et al. 1979, so the result does not depend on how the features were split (to rounding).
    """

    def __init__(self, dim: int, origin: Origin | None = None) -> None:
        self.dim, self.origin, self.n = dim, origin or Origin(), 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (ddof 1), [dim, dim]."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> Self:
        """Take in a batch of features [n, dim]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape [n, {self.dim}], got {tuple(features.shape)}")
        f = features.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(f).all()):
            raise UserError("features are not finite: the samples or the extractor's weights hold NaN or infinity")
        if len(f):
            centred = f - f.mean(dim=0)
            self._combine(len(f), f.mean(dim=0), centred.T @ centred)
        return self

    def merge(self, other: "FeatureStats") -> Self:
        """Take in what another process gathered."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of dimension {other.dim} into {self.dim}")
        if other.n:
            self._combine(other.n, other.mean, other.scatter)
        return self

    def _combine(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + delta[:, None] * delta[None, :] * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def save(self, path: str | Path) -> None:
        """Write ``.npz``: mu [dim], sigma [dim, dim] (as EDM's reference files have them), n and the origin."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mean.numpy(), sigma=self.cov.numpy(), n=self.n, **vars(self.origin))
        write_file(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStats":
        """Read a file of ``save``; one that lacks a key, or holds NaN, is refused by name."""
        values = read_npz(path, "make reference statistics with stats.py")
        wanted = ["mu", "sigma", "n", *vars(Origin())]
        if missing := [key for key in wanted if key not in values]:
            raise UserError(f"{path} has no {', '.join(missing)}: make reference statistics with stats.py")
        try:
            mu, sigma = (torch.tensor(values[key], dtype=torch.float64) for key in ("mu", "sigma"))
            n = int(values["n"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: mu, sigma and n must be numbers ({error}): make it again with stats.py") from None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"{path}: mu of shape {tuple(mu.shape)} and sigma of shape {tuple(sigma.shape)} do not fit")
        if not bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
            raise UserError(f"{path} holds NaN or infinity: make it again with stats.py")
        if n < 2 or not torch.allclose(sigma, sigma.T) or bool((sigma.diagonal() < 0).any()):
            raise UserError(f"{path}: sigma is no covariance of n = {n} samples: make it again with stats.py")
        stats = cls(len(mu), Origin(**{key: str(values[key]) for key in vars(Origin())}))
        stats.n, stats.mean = n, mu
        stats.scatter = sigma * (stats.n - 1)
        return stats

    def sha256(self) -> str:
        """Hash of the moments: the same reference has the same hash whatever its file is called."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.cov.numpy().tobytes()).hexdigest()


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of features from the same extractor.

    Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500). By the symmetric eigenvalue route, which stays real
    where a matrix square root of C_a C_b turns complex; tiny negative eigenvalues are rounding and count as 0.
    """
    for field in ("extractor", "weights", "resize"):
        ours, theirs = getattr(a.origin, field), getattr(b.origin, field)
        if ours != theirs:
            raise UserError(
                f"features differ in {field} ({ours or 'unknown'} against {theirs or 'unknown'}): no distance"
            )
    if a.dim != b.dim:
        raise UserError(f"features differ in size ({a.dim} against {b.dim}): no distance")
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)
