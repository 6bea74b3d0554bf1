"""Scores: Fréchet distance on named features, and distances between point clouds."""

from flowmaps.metrics.frechet import frechet_distance
from flowmaps.metrics.points import board_kl, sliced_w2
from flowmaps.metrics.stats import FeatureStats

__all__ = ["FeatureStats", "board_kl", "frechet_distance", "sliced_w2"]
