"""Scoring: references, ``evaluate`` for models and images, the gate for CI, and what people look at (grids, reports).

Usable from Python, from the command line and while training; everything that turns samples into a number or a picture
belongs here, and nothing about flags or training.
"""

from flowmaps.evaluation.evaluate import check_scorable, evaluate
from flowmaps.evaluation.references import Reference, open_reference, open_references

__all__ = ["Reference", "check_scorable", "evaluate", "open_reference", "open_references"]
