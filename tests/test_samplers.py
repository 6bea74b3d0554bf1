from itertools import pairwise

import pytest
import torch
from helpers import gaussian_data, gaussian_map

from samplers import euler, rollout, uniform_times

ORDERS = {euler: 1}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """The error falls as step size to the power of the order: slope of log error against log steps, within 0.1."""
    fm = gaussian_map("trigonometric", 0.7)
    x, _ = gaussian_data(fm, 50)
    exact = rollout(fm, x, uniform_times(1))
    counts = torch.tensor([64, 128, 256, 512])
    with torch.no_grad():
        errors = [(solver(fm.drift, x, uniform_times(int(n))) - exact).square().mean().sqrt() for n in counts]
    slope = torch.stack(errors).log().diff() / counts.double().log().diff()
    assert (slope + ORDERS[solver]).abs().max() < 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_rollout_composes_the_map_over_the_grid(steps):
    fm = gaussian_map(wrong=0.2)
    x, _ = gaussian_data(fm, 4)
    times = uniform_times(steps) ** 2
    expected = x
    for s, t in pairwise(times):
        expected = fm(expected, s.expand(4), t.expand(4))
    assert torch.equal(rollout(fm, x, times), expected)


@pytest.mark.parametrize("solver", [rollout, euler])
def test_callback_sees_every_state_once(solver):
    fm = gaussian_map()
    x, _ = gaussian_data(fm, 4)
    seen = []
    function = fm if solver is rollout else fm.drift
    end = solver(function, x, uniform_times(3), callback=lambda k, t, state: seen.append((k, float(t), state)))
    assert [k for k, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert torch.equal(seen[0][2], x) and torch.equal(seen[-1][2], end)


def test_evaluations_are_one_a_step():
    calls = []

    def drift(x, t, label):
        calls.append(t)
        return x

    euler(drift, torch.zeros(2, 3), uniform_times(5))
    assert len(calls) == 5


@pytest.mark.parametrize(
    "times", [[0.0], [[0.0, 1.0]], [0.0, 0.5, 0.5], [1.0, 0.0], [0.0, 1.5], [0.0, float("nan")]], ids=str
)
def test_bad_grids_are_refused(times):
    with pytest.raises(ValueError, match="times must"):
        euler(lambda x, t, label: x, torch.zeros(2, 3), torch.tensor(times))


def test_uniform_times():
    assert uniform_times(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="at least 1"):
        uniform_times(0)
