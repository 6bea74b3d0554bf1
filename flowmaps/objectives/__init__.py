"""Training objectives, one file a method and one row here; docs/maths.md has every equation.

Tests, config rows and docs go over this table: a method that is listed is tested.
"""

from flowmaps.objectives.base import Draws, Loss, Objective
from flowmaps.objectives.consistency import Consistency
from flowmaps.objectives.eulerian import Eulerian, ImprovedMeanFlow, MeanFlow
from flowmaps.objectives.flow_matching import FlowMatching
from flowmaps.objectives.lagrangian import Lagrangian, TerminalVelocity
from flowmaps.objectives.loss_weight import LogVariance
from flowmaps.objectives.mid_training import MidTraining
from flowmaps.objectives.progressive import Progressive, Shortcut
from flowmaps.objectives.straightening import Straightening
from flowmaps.objectives.trajectory import PathObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_matching": FlowMatching,
    "lagrangian": Lagrangian,
    "eulerian": Eulerian,
    "progressive": Progressive,
    "shortcut": Shortcut,
    "terminal_velocity": TerminalVelocity,
    "mean_flow": MeanFlow,
    "improved_mean_flow": ImprovedMeanFlow,
    "consistency": Consistency,
    "mid_training": MidTraining,
    "straightening": Straightening,
}

__all__ = [
    "OBJECTIVES",
    "Consistency",
    "Draws",
    "Eulerian",
    "FlowMatching",
    "ImprovedMeanFlow",
    "Lagrangian",
    "LogVariance",
    "Loss",
    "MeanFlow",
    "MidTraining",
    "Objective",
    "PathObjective",
    "Progressive",
    "Shortcut",
    "Straightening",
    "TerminalVelocity",
]
