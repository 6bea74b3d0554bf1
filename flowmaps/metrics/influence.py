"""The error of a Fréchet distance: what each sample contributes to it, its standard error and its bias.

The distance is a smooth function of the samples' mean and covariance. Its derivative towards a sample, the influence,
averages to zero, and its variance over the number of samples is the variance of the distance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.metrics.frechet import frechet_distance
from flowmaps.metrics.stats import FeatureStats

BLOCKS = 100  # of contiguous samples: a record keeps the mean influence of each
FOLDS = 10  # of the jackknife
ROWS = 4096  # features at a time in float64
SMALLEST_ERROR = 1e-3  # of the distance: below it a difference is rounding


@dataclass(frozen=True)
class DistanceError:
    """Standard error and bias of a distance, and the influence of ``BLOCKS`` contiguous parts of the samples."""

    se: float
    bias: float
    influence: list[float]


def transport(stats: FeatureStats, reference: FeatureStats) -> Tensor:
    """Return the linear optimal map T [dim, dim], float64, between Gaussians of the two covariances.

    T = R (R^T C R)^-1/2 R^T with R R^T = C_r, the inverse on the range: T C T = C_r on the range of C.
    """
    values, vectors = torch.linalg.eigh(reference.cov)
    root = vectors * values.clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(root.T @ stats.cov @ root)
    kept = values > stats.dim * torch.finfo(torch.float64).eps * values[-1]
    half = root @ (vectors[:, kept] * values[kept].pow(-0.25))
    linear: Tensor = half @ half.T
    return linear


def influence(features: Tensor, stats: FeatureStats, reference: FeatureStats) -> Tensor:
    """Return the derivative of the Fréchet distance to ``reference`` towards each sample.

    With d = f - mu it is 2 d . (mu - mu_r) + d^T (I - T) d, less its mean.

    Args:
        features: [n, dim], all samples.
        stats: Their moments.
        reference: Those of the reference.

    Returns:
        float64 [n]: the distance of a set with a share epsilon more of sample i is larger by epsilon times value i.
    """
    change = torch.eye(stats.dim, dtype=torch.float64) - transport(stats, reference)
    towards = 2 * (stats.mean - reference.mean)
    found = []
    for rows in torch.split(features, ROWS):
        apart = rows.double() - stats.mean
        found.append(apart @ towards + ((apart @ change) * apart).sum(dim=1))
    values = torch.cat(found)
    return values - values.mean()


def without_classes(values: Tensor, labels: Tensor | None) -> tuple[Tensor, int]:
    """Return ``values`` [n] less the mean of their class, and the number of classes.

    The samples of a class are as many whatever the seed, so that differences between classes add no variance. With
    fewer than two samples per class on average nothing could be estimated: the values stay, whose variance is larger.
    """
    if labels is None:
        return values, 1
    classes, index = torch.unique(labels, return_inverse=True)
    if len(values) < 2 * len(classes):
        return values, 1
    counts = torch.bincount(index)
    means = torch.zeros(len(classes), dtype=values.dtype).index_add(0, index, values) / counts
    return values - means[index], len(classes)


def jackknife_bias(features: Tensor, stats: FeatureStats, reference: FeatureStats) -> float:
    """Return the bias of the distance, from the distances without each of ``FOLDS`` contiguous parts of the samples."""
    distances = []
    for part in features.tensor_split(FOLDS):
        left = FeatureStats(stats.dim).update(part)
        rest = FeatureStats(stats.dim, stats.origin)
        total, own = stats.n or 0, left.n or 0
        rest.n = total - own
        rest.mean = (total * stats.mean - own * left.mean) / rest.n
        apart = left.mean - rest.mean
        rest.scatter = stats.scatter - left.scatter - own * rest.n / total * torch.outer(apart, apart)
        distances.append(frechet_distance(rest, reference))
    return (FOLDS - 1) * (sum(distances) / FOLDS - frechet_distance(stats, reference))


def standard_error(
    stats: FeatureStats, reference: FeatureStats, labels: Tensor | None = None
) -> tuple[float, list[float]]:
    """Return the standard error of the Fréchet distance and the influence of blocks, as in ``distance_error``."""
    if stats.features is None or len(stats.features) < BLOCKS:
        raise ValueError(f"a standard error needs the features of at least {BLOCKS} samples")
    n = len(stats.features)
    values, classes = without_classes(influence(stats.features, stats, reference), labels)
    error = float((values.square().sum() / (n - classes) / n).sqrt())
    return error, [float(f"{float(part.sum()) * BLOCKS / n:.7g}") for part in values.tensor_split(BLOCKS)]


def distance_error(stats: FeatureStats, reference: FeatureStats, labels: Tensor | None = None) -> DistanceError:
    """Return the error of the Fréchet distance of samples to ``reference``.

    Args:
        stats: Statistics of at least ``BLOCKS`` samples, with their features kept.
        reference: Statistics of the reference, taken as exact.
        labels: Classes int64 [n] whose shares are the same for every seed; None if there are none.

    Returns:
        The error. The sum of the influence of a block is counted ``BLOCKS`` / n times: the mean, if all are as large.
    """
    error, blocks = standard_error(stats, reference, labels)
    assert stats.features is not None
    return DistanceError(error, jackknife_bias(stats.features, stats, reference), blocks)


def paired_error(before: list[list[float]], after: list[list[float]]) -> float:
    """Return the standard error of the difference of two distances, each a mean over seeds.

    Args:
        before: For each seed the influence of the blocks, as ``DistanceError`` has it.
        after: The same of the other set: block by block the same noise, or else independent samples.
    """
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    return float((differences.var(dim=1) / differences.shape[1]).sum().sqrt()) / len(differences)
