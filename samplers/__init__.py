"""Walk a probability-flow path: time grids, map samplers and ODE solvers over plain callables; needs torch alone."""

from samplers.grids import check_times, log_snr_times, uniform_times
from samplers.map_samplers import rollout, stochastic
from samplers.schedule import Schedule
from samplers.solvers import dpm_solver, euler, heun, midpoint
from samplers.table import SAMPLERS, Sampler
from samplers.trajectories import Trajectory, trajectory

__all__ = [
    "SAMPLERS",
    "Sampler",
    "Schedule",
    "Trajectory",
    "check_times",
    "dpm_solver",
    "euler",
    "heun",
    "log_snr_times",
    "midpoint",
    "rollout",
    "stochastic",
    "trajectory",
    "uniform_times",
]
