"""Solvers' whole paths: orders of convergence, and what a trajectory is."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import gaussian_map

from samplers import Trajectory, dpm_solver, log_snr_times, rollout, trajectory, uniform_times
from samplers.trajectories import SOLVERS


@pytest.mark.parametrize(
    ("order", "slope", "low", "high"),
    [(1, 0.9, 0.1, 0.9), (2, 1.9, 0.1, 0.9), (1, 0.9, 1 / 81, 0.99), (2, 1.9, 1 / 81, 0.99), (3, 2.9, 1 / 81, 0.99)],
)
def test_orders_of_dpm_solver(order, slope, low, high):
    """The error to the exact map falls with the step's power; that of order 3 from nearly pure noise on."""
    fm = gaussian_map()
    x, errors = torch.randn(20, 3, dtype=torch.float64), []
    for steps in (32, 64, 128):
        grid = log_snr_times(steps, low, high) if low < 0.1 else low + (high - low) * uniform_times(steps)
        with torch.no_grad():
            exact = fm(x, torch.full((20,), low).double(), torch.full((20,), high).double())
            errors.append((dpm_solver(fm.drift, x, grid, order=order) - exact).norm())
    assert min(math.log2(a / b) for a, b in pairwise(errors)) > slope


def test_dpm_solver_from_noise_to_data_and_in_one_step():
    """At times 0 and 1 the log-SNR is infinite: there the step is of order 1, an Euler step of the drift."""
    fm = gaussian_map()
    x = torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():
        one = dpm_solver(fm.drift, x, uniform_times(1))
        torch.testing.assert_close(one, x + fm.drift(x, torch.zeros(20).double()))
        exact, found = rollout(fm, x, uniform_times(1)), dpm_solver(fm.drift, x, uniform_times(400))
        assert (found - exact).abs().max() < 0.02
    with pytest.raises(ValueError, match="order"):
        dpm_solver(fm.drift, x, uniform_times(1), order=4)


def test_order_one_is_exact_when_the_data_is_one_point():
    def drift(x, t, label):
        return (3.0 - x) / (1 - t[:, None])

    x, grid = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.0, 0.2, 0.9], dtype=torch.float64)
    for order in (1, 2, 3):
        torch.testing.assert_close(dpm_solver(drift, x, grid, order=order), 0.1 * x + 0.9 * 3.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_has_every_state_and_does_not_depend_on_its_batch(solver):
    fm = gaussian_map(classes=True)
    x, label, grid = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2, log_snr_times(5, 0.01, 0.99)
    whole = trajectory(fm.drift, x, grid, label, solver)
    assert whole.states.shape == (6, 6, 3) and not whole.states.requires_grad
    assert torch.equal(whole.states[0], x) and torch.equal(whole.label, label)
    torch.testing.assert_close(whole.states[-1], SOLVERS[solver](fm.drift, x, grid, label).detach())
    parts = [trajectory(fm.drift, x[rows], grid, label[rows], solver).states for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.states)


def test_grids_and_trajectories_of_nonsense_are_refused():
    times = log_snr_times(4, 0.1, 0.9)
    torch.testing.assert_close(times.logit().diff(), torch.full((4,), 2 * math.log(9) / 4, dtype=torch.float64))
    for steps, low, high in ((0, 0.1, 0.9), (4, 0.0, 0.9), (4, 0.1, 1.0), (4, 0.9, 0.1)):
        with pytest.raises(ValueError, match="log_snr_times"):
            log_snr_times(steps, low, high)
    for states, label in ((torch.zeros(4, 2, 3), None), (torch.zeros(5), None), (torch.zeros(5, 2, 3), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"states must|label has"):
            Trajectory(times, states, label)
