"""The error of a Fréchet distance against finite differences, a jackknife, and repeated draws."""

from statistics import NormalDist

import pytest
import torch

from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.influence import (
    BLOCKS,
    distance_error,
    influence,
    jackknife_bias,
    paired_error,
    transport,
    without_classes,
)

DIM = 6


def draws(n, seed, dim=DIM, shift=0.2, scale=1.2):
    """Gaussian features of a fixed covariance that is not that of ``exact``."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / dim**0.5
    noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * noise @ (torch.eye(dim) + mix / 2) + shift


def exact(dim=DIM):
    """A reference of infinitely many samples: mean 0, covariance 1."""
    stats = FeatureStats(dim)
    stats.n, stats.scatter = None, torch.eye(dim, dtype=torch.float64)
    return stats


def of(features):
    return FeatureStats(features.shape[1], keep=True).update(features)


def weighted(features, weights):
    """Moments of samples with weights, as those of a published file: the covariance is not scaled by n / (n - 1)."""
    weights = weights / weights.sum()
    stats = FeatureStats(features.shape[1])
    stats.n, stats.mean = None, weights @ features
    apart = features - stats.mean
    stats.scatter = (apart * weights[:, None]).T @ apart
    return stats


@pytest.mark.parametrize("n", [40, 5], ids=["full rank", "fewer samples than features"])
def test_influence_is_the_derivative(n):
    features, reference = draws(n, seed=2), of(draws(50, seed=3, shift=0.0))
    found = influence(features, weighted(features, torch.ones(n).double()), reference)
    assert abs(float(found.sum())) < 1e-12
    step = 1e-5
    for i in range(n):
        more, less = (torch.full((n,), (1 - e) / n, dtype=torch.float64) for e in (step, -step))
        more[i] += step
        less[i] -= step
        numeric = frechet_distance(weighted(features, more), reference)
        numeric -= frechet_distance(weighted(features, less), reference)
        assert float(found[i]) == pytest.approx(numeric / (2 * step), rel=1e-5, abs=1e-6)


def test_transport_maps_one_covariance_to_the_other():
    stats, reference = of(draws(50, 1)), of(draws(60, 2, scale=0.7))
    linear = transport(stats, reference)
    torch.testing.assert_close(linear @ stats.cov @ linear, reference.cov)


def test_influence_agrees_with_leaving_one_out():
    """In float64: n (D - D without i) is the influence, to the next order in 1 / n."""
    n, reference = 400, exact()
    features = draws(n, seed=4)
    stats, whole = of(features), frechet_distance(of(features), reference)
    without = [frechet_distance(of(torch.cat([features[:i], features[i + 1 :]])), reference) for i in range(n)]
    pseudo = n * (whole - torch.tensor(without, dtype=torch.float64))
    found = influence(features, stats, reference)
    assert float(torch.corrcoef(torch.stack([pseudo, found]))[0, 1]) > 0.999
    assert float(pseudo.std() / found.std()) == pytest.approx(1, abs=0.02)


def test_standard_error_and_bias_against_repeated_draws():
    n, reference, seeds = 500, exact(), range(200)
    sets = [of(draws(n, seed)) for seed in seeds]
    distances = torch.tensor([frechet_distance(stats, reference) for stats in sets])
    errors = [distance_error(stats, reference) for stats in sets[:20]]
    assert float(distances.std()) == pytest.approx(sum(error.se for error in errors) / 20, rel=0.15)
    truth = frechet_distance(of(draws(400_000, seed=999)), reference)
    bias = sum(jackknife_bias(stats.features, stats, reference) for stats in sets) / len(sets)
    assert float(distances.mean()) - bias == pytest.approx(truth, rel=0.02)
    assert bias > 0.03 * truth  # which the correction thus removes


def test_classes_add_no_variance():
    """Classes far apart: the distance varies as within a class, and the error says so."""
    n, reference = 1000, exact()
    labels = torch.arange(n) % 10
    centres = 3 * torch.randn(10, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sets = [of(draws(n, seed) + centres[labels]) for seed in range(60)]
    spread = float(torch.tensor([frechet_distance(stats, reference) for stats in sets]).std())
    assert distance_error(sets[0], reference, labels).se == pytest.approx(spread, rel=0.25)
    assert distance_error(sets[0], reference).se > 1.5 * spread
    blocks = torch.tensor(distance_error(sets[0], reference, labels).influence)
    assert float(blocks.std()) / BLOCKS**0.5 == pytest.approx(spread, rel=0.3)


def test_too_few_samples_for_their_classes():
    values = torch.randn(30, dtype=torch.float64)
    assert without_classes(values, torch.arange(30) % 20) == (values, 1)
    assert without_classes(values, torch.arange(30) % 15)[1] == 15


@pytest.mark.parametrize("level", [0.05, 0.01])
def test_false_alarms_and_power_of_the_paired_test(level):
    """Two models that share their noise. Equal by a coin for each sample; else one is worse by 3 %."""
    n, reference, rounds, threshold = 500, exact(), 300, NormalDist().inv_cdf(1 - level)

    def significant(before, after):
        a, b = (of(features) for features in (before, after))
        blocks = [[influence_blocks(stats)] for stats in (a, b)]
        difference = frechet_distance(b, reference) - frechet_distance(a, reference)
        return difference > threshold * paired_error(*blocks)

    def influence_blocks(stats):
        parts = influence(stats.features, stats, reference).tensor_split(BLOCKS)
        return [float(part.sum()) * BLOCKS / n for part in parts]

    alarms = found = 0
    for seed in range(rounds):
        one, other = draws(n, seed), draws(n, seed, scale=1.215)
        other = other + 0.1 * draws(n, seed + 10_000, shift=0.0)
        coin = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
        alarms += significant(torch.where(coin, one, other), torch.where(coin, other, one))
        found += significant(one, other)
    assert alarms / rounds <= level + 3 * (level * (1 - level) / rounds) ** 0.5
    assert found / rounds > 0.9


def test_two_seeds_are_a_mean():
    g = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(BLOCKS, generator=g).tolist() for _ in range(2)] for _ in range(2))
    one, two = (paired_error([a[i]], [b[i]]) for i in range(2))
    assert paired_error(a, b) == pytest.approx((one**2 + two**2) ** 0.5 / 2)
    assert paired_error(a, a) == 0


def test_an_error_needs_the_features():
    with pytest.raises(ValueError, match="features"):
        distance_error(FeatureStats(DIM).update(draws(200, 0)), exact())
