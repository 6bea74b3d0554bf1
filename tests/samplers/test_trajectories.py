"""Orders of convergence of the solvers, and their trajectories."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import gaussian_map, generator

from samplers import SAMPLERS, Trajectory, dpm_solver, heun, log_snr_times, rollout, trajectory, uniform_times

SOLVERS = [name for name, row in SAMPLERS.items() if row.of == "drift"]


def mixture_drift(x, t, label=None):
    """The drift of an equal mixture of N(-1, 1/4) and N(1/2, 1/4): nonlinear, unlike that of a Gaussian."""
    t, y, means = t[:, None, None], x[..., None], torch.tensor([-1.0, 0.5], dtype=torch.float64)
    var = (1 - t) ** 2 + t**2 / 4
    share = torch.softmax(-((y - t * means) ** 2) / (2 * var), dim=-1)
    data = (share * (means + t / (4 * var) * (y - t * means))).sum(dim=-1)
    return (data - x) / (1 - t[..., 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_falls_with_the_order_in_the_table(solver):
    """On a log-SNR grid that starts close to noise, where the multistep solver reaches its order too."""
    x, low, high = torch.randn(50, 1, generator=generator(), dtype=torch.float64), 1e-3, 0.7
    exact = heun(mixture_drift, x, log_snr_times(8192, low, high))
    run, order = SAMPLERS[solver].run, SAMPLERS[solver].order
    errors = [(run(mixture_drift, x, log_snr_times(n, low, high)) - exact).norm() for n in (32, 64, 128, 256)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert order - 0.1 < min(rates) and max(rates) < order + 0.3


def test_a_map_sampler_has_no_trajectory_of_a_drift():
    with pytest.raises(ValueError, match="solver must be one of euler, heun, dpm_solver"):
        trajectory(gaussian_map().drift, torch.zeros(2, 3).double(), uniform_times(2), None, "stochastic")


@pytest.mark.parametrize(
    ("order", "slope", "low", "high"),
    [(1, 0.9, 0.1, 0.9), (2, 1.9, 0.1, 0.9), (1, 0.9, 1 / 81, 0.99), (2, 1.9, 1 / 81, 0.99), (3, 2.9, 1 / 81, 0.99)],
)
def test_orders_of_dpm_solver(order, slope, low, high):
    """The error falls with the power of the step; order 3 is reached on grids from nearly pure noise."""
    fm = gaussian_map()
    x, errors = torch.randn(20, 3, dtype=torch.float64), []
    for steps in (32, 64, 128):
        grid = log_snr_times(steps, low, high) if low < 0.1 else low + (high - low) * uniform_times(steps)
        with torch.no_grad():
            exact = fm(x, torch.full((20,), low).double(), torch.full((20,), high).double())
            errors.append((dpm_solver(fm.drift, x, grid, order=order) - exact).norm())
    assert min(math.log2(a / b) for a, b in pairwise(errors)) > slope


@pytest.mark.parametrize(("order", "bounds"), [(2, (0.085, 0.024, 0.0056)), (3, (0.085, 0.0032, 0.0008))])
def test_dpm_solver_in_few_steps(order, bounds):
    """The error at data in 8, 16 and 32 steps, on a ring of eight Gaussians of 0.3, of the forms that were kept."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = torch.stack([angle.cos(), angle.sin()])

    def drift(x, t, label):
        t, y = t[:, None, None], x[..., None]
        var = 0.25 * (1 - t) ** 2 + 0.09 * t**2
        share = torch.softmax(-((y - t * means) ** 2).sum(dim=1, keepdim=True) / (2 * var), dim=-1)
        data = (share * (means + 0.09 * t / var * (y - t * means))).sum(dim=-1)
        return (data - x) / (1 - t[..., 0])

    x = 0.5 * torch.randn(200, 2, generator=generator(), dtype=torch.float64)
    exact = heun(drift, x, log_snr_times(1024, 0.0062, 0.996))
    for steps, bound in zip((8, 16, 32), bounds, strict=True):
        end = dpm_solver(drift, x, log_snr_times(steps, 0.0062, 0.996), order=order)
        assert (end - exact).square().mean().sqrt() < bound


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
    torch.testing.assert_close(whole.states[-1], SAMPLERS[solver].run(fm.drift, x, grid, label).detach())
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
