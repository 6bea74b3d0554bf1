"""Training objectives, one file a method and one row here; docs/maths.md has every equation.

Tests, config rows and docs go over this table: a method that is listed is tested.
"""

from flowmaps.objectives.base import Draws, Loss, Objective
from flowmaps.objectives.flow_matching import FlowMatching
from flowmaps.objectives.lagrangian import Lagrangian
from flowmaps.objectives.weight import LogVariance

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_matching": FlowMatching,
    "lagrangian": Lagrangian,
}

__all__ = ["OBJECTIVES", "Draws", "FlowMatching", "Lagrangian", "LogVariance", "Loss", "Objective"]
