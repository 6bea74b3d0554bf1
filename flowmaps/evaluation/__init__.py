"""Scoring: a model or images against a reference, from Python, in CI and while training."""
