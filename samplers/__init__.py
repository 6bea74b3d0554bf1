"""How to walk a probability-flow path: time grids, map rollouts and ODE solvers over plain callables."""

from samplers.grids import check_times, uniform_times
from samplers.ode import euler
from samplers.rollout import rollout

__all__ = ["check_times", "euler", "rollout", "uniform_times"]
