"""How to walk a probability-flow path: time grids, map rollouts and ODE solvers over plain callables."""

from samplers.grids import check_times, log_snr_times, uniform_times
from samplers.map_samplers import rollout, stochastic
from samplers.schedule import Schedule
from samplers.solvers import dpm_solver, euler, heun
from samplers.trajectories import Trajectory, trajectory

__all__ = [
    "Schedule",
    "Trajectory",
    "check_times",
    "dpm_solver",
    "euler",
    "heun",
    "log_snr_times",
    "rollout",
    "stochastic",
    "trajectory",
    "uniform_times",
]
