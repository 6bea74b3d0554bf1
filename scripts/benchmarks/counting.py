"""Bias and variance of a Fréchet distance over other samples of the same model, which are due to counting alone."""

import torch
from torch import Tensor

from flowmaps.metrics import FeatureStats


def root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return found


def bias(stats: FeatureStats) -> float:
    """Return the bias of the distance to a close reference, times the number of samples.

    For features with covariance C of eigenvalues l: tr C + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j), the error of
    the mean and that of the covariance to second order, as if the features were normally distributed.
    """
    values = torch.linalg.eigvalsh(stats.cov).clamp(min=0)
    pairs = values[:, None] * values / (values[:, None] + values).clamp(min=1e-300)
    return float(values.sum() + (pairs.sum() + pairs.diagonal().sum()) / 2)


def variance(stats: FeatureStats, reference: FeatureStats) -> float:
    """Return the variance of the distance over samples, times their number, to first order.

    4 d^T C d + 2 tr (C - M)^2, with the difference d of the means and M = (C^1/2 C_r C^1/2)^1/2, as if the features
    were normally distributed.
    """
    cov, apart = stats.cov, stats.mean - reference.mean
    half = root(cov)
    rest = cov - root(half @ reference.cov @ half)
    return float(4 * apart @ cov @ apart + 2 * rest.square().sum())
