"""Scores: Fréchet distance on named features, and distances between point clouds."""

from flowmaps.metrics.points import board_kl, sliced_w2
from flowmaps.metrics.stats import FeatureStats, frechet_distance

__all__ = ["FeatureStats", "board_kl", "frechet_distance", "sliced_w2"]
