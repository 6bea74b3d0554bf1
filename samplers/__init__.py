"""How to walk a probability-flow path: time grids, map rollouts and ODE solvers over plain callables."""

from samplers.grids import check_times, uniform_times
from samplers.ode import euler, heun
from samplers.rollout import rollout
from samplers.stochastic import stochastic

__all__ = ["check_times", "euler", "heun", "rollout", "stochastic", "uniform_times"]
