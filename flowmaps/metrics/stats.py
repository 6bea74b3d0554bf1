"""Moments of features with their provenance, and the files that they are in."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.files import WRITER, WRITTEN_BY, write_file
from flowmaps.metrics.stored import AGAIN, FACTS, PUBLISHED_DIMS, REMEDY, Origin, Stored

LARGEST_N, LARGEST_SQUARE = 1 << 53, 1e100  # of samples, and of a feature's square


class FeatureStats:
    """Mean and covariance of features, in float64, fed batch by batch and merged in any order.

    Holds n, the mean and the scatter matrix sum (f - mean)(f - mean)^T; batches are combined by the pairwise update of
    Chan et al. 1979, so the result does not depend on how the features were split (to rounding). With ``keep`` the
    features themselves are also kept, in ``features`` [n, dim] float32: metrics that compare samples need them.

    Example:
        >>> stats = FeatureStats(64).update(torch.randn(100, 64)).update(torch.randn(100, 64))
        >>> stats.n, stats.mean.shape, stats.cov.shape
        (200, torch.Size([64]), torch.Size([64, 64]))
    """

    def __init__(self, dim: int, origin: Origin | None = None, keep: bool = False) -> None:
        self.dim, self.origin = dim, origin or Origin()
        self.n: int | None = 0  # None: moments of a published file, which does not say
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._kept: list[Tensor] | None = [] if keep else None

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (ddof 1), [dim, dim]."""
        if self.n is None:
            return self.scatter
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    @property
    def rank_bound(self) -> int:
        """Largest rank that the covariance can have."""
        return self.dim if self.n is None else min(self.dim, self.n - 1)

    @property
    def features(self) -> Tensor | None:
        """The features [n, dim] in order of arrival; None without ``keep``."""
        if self._kept is not None and len(self._kept) != 1:
            self._kept = [torch.cat([torch.empty(0, self.dim), *self._kept])]
        return None if self._kept is None else self._kept[0]

    @features.setter
    def features(self, value: Tensor | None) -> None:
        self._kept = None if value is None else [value]

    def update(self, features: Tensor) -> Self:
        """Add a batch of features [n, dim]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape [n, {self.dim}], got {tuple(features.shape)}")
        f = features.detach()
        f = (f.cpu() if f.device.type == "mps" else f).double()  # Apple's GPUs have no float64
        if not bool(torch.isfinite(f).all()):
            raise UserError("features are not finite: the samples or the extractor's weights hold NaN or infinity")
        if len(f):
            mean = f.mean(dim=0)
            self._combine(len(f), mean.cpu(), ((f - mean).T @ (f - mean)).cpu())
        if self._kept is not None:
            self._kept.append(features.detach().cpu().float())
        return self

    def merge(self, other: "FeatureStats") -> Self:
        """Add the features that ``other`` has seen."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of dimension {other.dim} into {self.dim}")
        if other.n != 0:
            self._combine(other.n, other.mean, other.scatter)
        if self._kept is not None and other.features is not None:
            self._kept.append(other.features)
        return self

    def _combine(self, n: int | None, mean: Tensor, scatter: Tensor) -> None:
        if n is None or self.n is None:
            raise ValueError("the moments of a published file cannot be added to: their n is unknown")
        total = self.n + n
        delta = mean - self.mean
        self.scatter.add_(scatter).addr_(delta, delta, alpha=self.n * n / total)
        self.mean.add_(delta, alpha=n / total)
        self.n = total

    def save(self, path: str | Path, check: bool = True, others: "Sequence[FeatureStats]" = ()) -> None:
        """Write an ``.npz``: mu [dim], sigma [dim, dim] (as in EDM's reference files), n, the origin, kept features.

        Args:
            path: The file.
            check: Refuse to replace a file that flowmaps did not write.
            others: Statistics of the same images by other extractors; their keys start with ``EXTRACTOR/``.
        """
        arrays: dict[str, Any] = {WRITTEN_BY: WRITER, **self._arrays()}
        for other in others:
            arrays |= {f"{other.origin.extractor}/{key}": value for key, value in other._arrays().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_file(Path(path), buffer.getvalue(), check)

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.cov.numpy(), "n": self.n, **vars(self.origin)}
        return arrays if self.features is None else arrays | {"features": self.features.numpy()}

    @classmethod
    def load(cls, path: str | Path, extractor: str | None = None) -> "FeatureStats":
        """Read a file of ``save``, or one that EDM, EDM2 or ADM published.

        Published files have mu and sigma without n and the weights: of Inception's 2048 features, ADM's also of its
        2023 spatial ones, EDM2's also of DINOv2's 1024. ADM's also have images (arr_0), whose size is noted. EDM2's
        are pickles (.pkl), from which no code is run.

        Args:
            path: The file.
            extractor: The extractor whose statistics are read, of a file with those of several; by default the first.

        Raises:
            UserError: The file is missing, damaged or ambiguous, or has no statistics of this extractor.
        """
        return cls._parse(Stored.open(Path(path)), extractor)

    @classmethod
    def _parse(cls, stored: Stored, extractor: str | None) -> "FeatureStats":
        path, own = stored.path, stored.own
        shapes = stored.shapes(extractor)
        if missing := [key for key in ("mu", "sigma", *(["n", *FACTS] if own else [])) if key not in shapes]:
            raise UserError(f"{path} has no {', '.join(missing)}: {REMEDY}")
        name = extractor or stored.first
        if not own and shapes["mu"] != (PUBLISHED_DIMS[name],):
            raise UserError(
                f"{path} has mu of shape {shapes['mu']} and does not name its extractor: published files have "
                f"{PUBLISHED_DIMS[name]} features of {name.capitalize()}; {REMEDY}"
            )
        dim = shapes["mu"][0] if len(shapes["mu"]) == 1 else 0
        if not dim or shapes["sigma"] != (dim, dim):
            raise UserError(f"{path}: mu of shape {shapes['mu']} and sigma of shape {shapes['sigma']} do not fit")
        values = stored.values(extractor)
        if wrong := [key for key in ("mu", "sigma") if values[key].dtype.kind not in "fiu"]:
            raise UserError(f"{path}: {wrong[0]} must be numbers, it is {values[wrong[0]].dtype}: {AGAIN}")
        if wrong := [key for key in FACTS if own and (values[key].ndim or values[key].dtype.kind != "U")]:
            raise UserError(f"{path}: {wrong[0]} must be one text: {AGAIN}")
        mu, sigma = (torch.tensor(values[key], dtype=torch.float64) for key in ("mu", "sigma"))
        precision = np.finfo(values["sigma"].dtype).eps if values["sigma"].dtype.kind == "f" else 0.0
        if reason := not_moments(mu, sigma, float(precision)):
            raise UserError(f"{path}: {reason}: {AGAIN}")
        n = values["n"] if own else None
        if n is not None and (n.ndim or n.dtype.kind not in "iu" or not 2 <= n <= LARGEST_N):
            raise UserError(f"{path}: n must be a whole number of at least 2, it is {shorten(n, 40)}: {AGAIN}")
        origin = Origin(**{key: str(values[key]) for key in FACTS}) if own else stored.origin(name)
        stats = cls(dim, origin)
        stats.n, stats.mean = None if n is None else int(n), mu
        stats.scatter = sigma if stats.n is None else sigma * (stats.n - 1)
        if own and "features" in values:
            features = values["features"]
            if features.shape != (n, dim) or features.dtype != np.float32 or not np.isfinite(features).all():
                raise UserError(f"{path}: features must be {n} x {dim} finite numbers: {AGAIN}")
            stats.features = torch.from_numpy(features)
        return stats

    def sha256(self) -> str:
        """Return the hash of the moments, which does not depend on the file's name."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.cov.numpy().tobytes()).hexdigest()


def not_moments(mu: Tensor, sigma: Tensor, precision: float = 0.0) -> str:
    """Return why ``mu`` [dim] and ``sigma`` [dim, dim] are not a mean and a covariance; empty if they are.

    A covariance is symmetric and has no eigenvalue below zero, to rounding: that of float64 and of ``precision``, the
    relative one of the numbers as they were stored, in moments of this size, whose difference it is.
    """
    if not bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        return "mu or sigma holds NaN or infinity"
    scale = float(sigma.norm() + mu.norm() ** 2)  # at least the largest eigenvalue
    if not scale < LARGEST_SQUARE:
        return f"mu or sigma is as large as {scale:.0e}"
    rounding = max(len(mu) * max(precision, torch.finfo(torch.float64).eps) * scale, 1e-300)
    if bool((sigma - sigma.T).abs().max() > rounding):
        return "sigma is not a covariance: it is not symmetric"
    shifted = (sigma + sigma.T) / 2 + rounding * torch.eye(len(mu), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(shifted).info):
        return "sigma is not a covariance: it has a negative eigenvalue"
    return ""
