"""Walk a probability-flow path: time grids, map samplers and ODE solvers over plain callables; needs torch alone."""

from samplers.grids import check_times, log_snr_times, uniform_times
from samplers.invert import invert, invert_drift
from samplers.map_samplers import rollout, stochastic
from samplers.measurement import Measurement, downsample, inpaint
from samplers.schedule import Schedule
from samplers.solvers import dpm_solver, euler, heun, midpoint
from samplers.steer import Score, Steered, steer
from samplers.table import SAMPLERS, Sampler
from samplers.trajectories import Trajectory, trajectory

__all__ = [
    "SAMPLERS",
    "Measurement",
    "Sampler",
    "Schedule",
    "Score",
    "Steered",
    "Trajectory",
    "check_times",
    "downsample",
    "dpm_solver",
    "euler",
    "heun",
    "inpaint",
    "invert",
    "invert_drift",
    "log_snr_times",
    "midpoint",
    "rollout",
    "steer",
    "stochastic",
    "trajectory",
    "uniform_times",
]
