"""Training objectives: one file and one row of OBJECTIVES per method. docs/maths.md has every equation.

Tests, config rows and docs iterate over this table, so a listed method is a tested one. ``SelfDistillation`` is the
base of methods that learn from data, ``TrajectoryObjective`` of those that learn from a teacher's solver paths.
"""

from flowmaps.objectives.base import Draws, Loss, Objective
from flowmaps.objectives.consistency import Consistency
from flowmaps.objectives.eulerian import Eulerian, MeanFlow
from flowmaps.objectives.facm import FACM
from flowmaps.objectives.flow_matching import FlowMatching
from flowmaps.objectives.improved_mean_flow import ImprovedMeanFlow
from flowmaps.objectives.lagrangian import Lagrangian, TerminalVelocity
from flowmaps.objectives.loss_weight import LogVariance
from flowmaps.objectives.mid_training import MidTraining
from flowmaps.objectives.progressive import Progressive, Shortcut
from flowmaps.objectives.self_distillation import SelfDistillation
from flowmaps.objectives.small_step import AlphaFlow, SoFlow
from flowmaps.objectives.straightening import Straightening
from flowmaps.objectives.trajectory import TrajectoryObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_matching": FlowMatching,
    "lagrangian": Lagrangian,
    "eulerian": Eulerian,
    "progressive": Progressive,
    "shortcut": Shortcut,
    "terminal_velocity": TerminalVelocity,
    "mean_flow": MeanFlow,
    "improved_mean_flow": ImprovedMeanFlow,
    "soflow": SoFlow,
    "alpha_flow": AlphaFlow,
    "consistency": Consistency,
    "facm": FACM,
    "mid_training": MidTraining,
    "straightening": Straightening,
}

__all__ = [
    "FACM",
    "OBJECTIVES",
    "AlphaFlow",
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
    "Progressive",
    "SelfDistillation",
    "Shortcut",
    "SoFlow",
    "Straightening",
    "TerminalVelocity",
    "TrajectoryObjective",
]
