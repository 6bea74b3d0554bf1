"""The Fréchet distance between two sets of features, and which sets are comparable."""

from typing import Any

import numpy as np
import scipy.linalg

from flowmaps.errors import UserError
from flowmaps.metrics.stats import LARGEST_SQUARE, FeatureStats


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
