"""Moments of features, and the Fréchet distance between two sets of features."""

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.files import WRITER, WRITTEN_BY, write_file
from flowmaps.reading import npz_shapes, read_npz, regular_file

INCEPTION_DIM = 2048
REMEDY, AGAIN = "make reference statistics with stats.py", "make it again with stats.py"
LARGEST_N, LARGEST_SQUARE = 1 << 53, 1e100  # of samples, and of a feature's square


@dataclass(frozen=True)
class Origin:
    """Provenance of features; a fact is empty where it is not known.

    Two sets are comparable only if extractor, weights, resize and size agree, as far as both are known.
    """

    extractor: str = ""
    weights: str = ""  # SHA-256 of the extractor's weight file
    resize: str = ""  # what the extractor does to an image first
    size: str = ""  # of the images, height x width
    crop: str = ""  # how the images got that size
    data: str = ""
    split: str = ""
    content: str = ""  # SHA-256 of the images: the same on every machine, where moments differ by rounding


def pixels(height: int, width: int) -> str:
    """Format an image size as ``Origin.size`` has it."""
    return f"{height}x{width}"


FACTS = tuple(field.name for field in fields(Origin))


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

    def save(self, path: str | Path, check: bool = True) -> None:
        """Write an ``.npz``: mu [dim], sigma [dim, dim] (as in EDM's reference files), n, the origin, kept features.

        ``check``: refuse to replace a file that flowmaps did not write.
        """
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.cov.numpy(), "n": self.n, **vars(self.origin)}
        arrays[WRITTEN_BY] = WRITER
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_file(Path(path), buffer.getvalue(), check)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStats":
        """Read a file of ``save``, or one that EDM, EDM2 or ADM published.

        Published files have mu and sigma of Inception's 2048 features, without n and the weights. ADM's also have
        images (arr_0), whose size is noted. EDM2's are pickles (.pkl), from which no code is run.

        Raises:
            UserError: The file is missing, damaged or ambiguous.
        """
        pickled = _moments_in_pickle(Path(path)) if str(path).endswith(".pkl") else None
        shapes = npz_shapes(path, REMEDY) if pickled is None else {key: value.shape for key, value in pickled.items()}
        own = "extractor" in shapes
        wanted = ["mu", "sigma", *(["n", *FACTS] if own else [])]
        if missing := [key for key in wanted if key not in shapes]:
            raise UserError(f"{path} has no {', '.join(missing)}: {REMEDY}")
        if not own and shapes["mu"] != (INCEPTION_DIM,):
            raise UserError(
                f"{path} has mu of shape {shapes['mu']} and does not name its extractor: published files have "
                f"{INCEPTION_DIM} features of Inception; {REMEDY}"
            )
        dim = shapes["mu"][0] if len(shapes["mu"]) == 1 else 0
        if not dim or shapes["sigma"] != (dim, dim):
            raise UserError(f"{path}: mu of shape {shapes['mu']} and sigma of shape {shapes['sigma']} do not fit")
        values = read_npz(path, REMEDY, {*wanted, "features"}) if pickled is None else pickled
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
        stats = cls(dim, Origin(**{key: str(values[key]) for key in FACTS}) if own else _published(path, shapes))
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


def _moments_in_pickle(path: Path) -> dict[str, Any]:
    from flowmaps.importers.pickles import read_objects

    regular_file(path, REMEDY)
    try:
        moments = read_objects(path)["fid"]
        return {key: np.asarray(moments[key].value) for key in ("mu", "sigma")}
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing, damaged or not a file of EDM2's reference statistics: {REMEDY}") from None


def _published(path: str | Path, shapes: dict[str, tuple[int, ...]]) -> Origin:
    images = shapes.get("arr_0", ())  # [n, height, width, channels]
    size = pixels(*images[1:3]) if len(images) == 4 else ""
    return Origin(extractor="inception", size=size, data=Path(path).name)


def _factor(cov: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return L [dim, rank] with L L^T = ``cov``, by Cholesky with pivoting, which stops at the rank to rounding."""
    packed, order, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    factor = np.empty((len(cov), rank))
    factor[order - 1] = np.tril(packed)[:, :rank]
    return factor


def _cross_trace(a: FeatureStats, b: FeatureStats) -> float:
    """Return tr (C_a^1/2 C_b C_a^1/2)^1/2.

    With C_a = L_a L_a^T it is the sum of the roots of the eigenvalues of L_a^T C_b L_a, as many as the smaller rank.
    Rounding spoils the roots of small eigenvalues. Where that might exceed 1e-8 of the two traces, it is the sum of the
    singular values of L_a^T L_b instead, which has no roots to take.
    """
    if b.rank_bound < a.rank_bound:
        a, b = b, a
    c_a, c_b = a.cov.numpy(), b.cov.numpy()
    factor = _factor(c_a)
    if not factor.shape[1]:
        return 0.0
    values = scipy.linalg.eigvalsh(factor.T @ c_b @ factor).clip(min=0)
    rounding = 4 * np.finfo(np.float64).eps * values[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.fmin(rounding / (2 * np.sqrt(values)), np.sqrt(rounding)).sum()
    if error <= 1e-8 * (c_a.trace() + c_b.trace()):
        return float(np.sqrt(values).sum())
    return float(scipy.linalg.svdvals(factor.T @ _factor(c_b)).sum())


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of features from the same extractor.

    Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500). The last trace is computed from a factor of one
    covariance: real where a matrix square root of C_a C_b turns complex, and exact to 1e-8 of the two traces.

    Args:
        a: Statistics of one set; the order of the two does not matter.
        b: Statistics of the other set.

    Returns:
        The squared distance, called FID on Inception features.

    Raises:
        UserError: The features are not comparable (extractor, weights, image size), or there are fewer than 2 samples.
    """
    check_comparable(a, b)
    apart = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    if not float(apart) < LARGEST_SQUARE:
        raise UserError(f"features of size {float(apart) ** 0.5:.0e} have no distance: they must be finite and smaller")
    return max(float(apart - 2 * _cross_trace(a, b)), 0.0)


def check_comparable(a: FeatureStats, b: FeatureStats) -> None:
    """Refuse two sets of features whose distance would be meaningless."""
    for fact in ("extractor", "weights", "resize", "size"):
        ours, theirs = getattr(a.origin, fact), getattr(b.origin, fact)
        if ours != theirs and (fact == "extractor" or (ours and theirs)):
            what = "images differ in size" if fact == "size" else f"features differ in {fact}"
            remedy = "; stats.py --size=N makes a reference of another size" if fact == "size" else ""
            raise UserError(f"{what} ({ours or 'unknown'} against {theirs or 'unknown'}): no distance{remedy}")
    if a.dim != b.dim:
        raise UserError(f"features differ in size ({a.dim} against {b.dim}): no distance")
