"""Dynamic programming against brute force, and costs against their definition."""

import itertools

import pytest
import torch
from helpers import gaussian_map, generator

from samplers import Trajectory, trajectory, uniform_times
from samplers.bellman import errors, euler_cost, euler_endpoints, heun_cost, map_cost, solve, solve_all, vjp_to_end


def brute(cost, steps):
    last = len(cost) - 1
    paths = ((0, *inner, last) for inner in itertools.combinations(range(1, last), steps - 1))
    return min((sum(float(cost[a, b]) for a, b in itertools.pairwise(path)), path) for path in paths)


@pytest.mark.parametrize("whole", [False, True])
def test_solve_equals_brute_force(whole):
    """300 matrices of up to 12 nodes; with whole numbers there are ties, and the first path in order is taken."""
    g = generator()
    for trial in range(150):
        nodes = 2 + trial % 11
        cost = torch.rand(nodes, nodes, generator=g, dtype=torch.float64)
        cost = (3 * cost).floor() if whole else cost
        for steps, (path, value) in solve_all(cost, nodes - 1).items():
            best, expected = brute(cost, steps)
            assert value == pytest.approx(best, abs=1e-12) and solve(cost, steps) == (path, value)
            assert not whole or path == list(expected)
        assert solve(cost, 1)[0] == [0, nodes - 1] and solve(cost, nodes - 1)[0] == list(range(nodes))


def test_never_above_the_uniform_grid():
    fm, noise = gaussian_map(), torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    cost = euler_cost(fm.drift, noise, uniform_times(24))
    for steps in (1, 2, 3, 4, 6, 8, 12, 24):
        path = range(0, 25, 24 // steps)
        assert solve(cost, steps)[1] <= sum(float(cost[a, b]) for a, b in itertools.pairwise(path)) + 1e-15


@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("case", [("linear", 1.0, False), ("trigonometric", 0.7, True)])
def test_costs_equal_their_definition(case, sqrt):
    fm, times = gaussian_map(*case), uniform_times(6)
    x = torch.randn(10, 3, generator=generator(), dtype=torch.float64)
    label = torch.arange(10) % 2 if case[2] else None
    walked = trajectory(fm.drift, x, times, label, "euler")

    def jump(name, j, k):
        a, s, t = walked.states[j], times[j].expand(10), times[k].expand(10)
        b = fm.drift(a, s, label)
        if name == "map":
            return fm(a, s, t, label)
        end = a + (t - s)[:, None] * b
        return end if name == "euler" else a + (t - s)[:, None] / 2 * (b + fm.drift(end, t, label))

    found = {
        "euler": euler_cost(fm.drift, x, times, label, sqrt=sqrt, batch=3),
        "heun": heun_cost(fm.drift, walked, sqrt=sqrt),
        "map": map_cost(fm, walked, sqrt=sqrt),
    }
    for name, cost in found.items():
        expected = torch.zeros(7, 7, dtype=torch.float64)
        for j, k in itertools.combinations(range(7), 2):
            squared = (jump(name, j, k) - walked.states[k]).square().mean(dim=1).detach()
            expected[j, k] = (squared.sqrt() if sqrt else squared).mean()
        torch.testing.assert_close(cost, expected, rtol=1e-9, atol=1e-13)
    assert found["euler"].diagonal(1).abs().max() < (1e-14 if sqrt else 1e-28)


def test_errors_carried_to_the_end_by_the_linearised_flow():
    """The Gaussian drift is affine with slope A_t on each axis: J is the product of 1 + h A over the steps left."""
    fm, times = gaussian_map(), uniform_times(5)
    x = torch.randn(7, 3, generator=generator(), dtype=torch.float64)
    walked = trajectory(fm.drift, x, times, None, "euler")
    w = torch.randn(2, 7, 3, generator=generator(1), dtype=torch.float64)
    std, t = fm.network.std, times[:-1, None]
    slope = (-(1 - t) + t * std**2) / ((1 - t) ** 2 + t**2 * std**2)
    left = torch.ones(6, 3, dtype=torch.float64)
    for k in range(4, -1, -1):
        left[k] = left[k + 1] * (1 + slope[k] / 5)
    torch.testing.assert_close(vjp_to_end(fm.drift, walked, w), w * left[:, None, None])
    many = euler_cost(fm.drift, x, times, num_probes=4000, generator=generator(2))
    for j, k in ((0, 5), (0, 3), (2, 4)):
        end = walked.states[j] + (times[k] - times[j]) * fm.drift(walked.states[j], times[j].expand(7))
        expected = ((end - walked.states[k]) * left[k]).square().mean().item()
        assert many[j, k].item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("sqrt", [False, True])
def test_solved_grids_match_a_continuous_optimiser(sqrt, propagate):
    """Exact states of the Gaussian drift on 400 steps, against L-BFGS on the same objective in closed form.

    Errors are linear in noise, axis by axis: the two noises +1 and -1 have the moments of all noise.
    """
    fm, fine = gaussian_map(), uniform_times(400)
    mean, std = fm.network.mean, fm.network.std

    def variance(t):
        return (1 - t) ** 2 + t**2 * std**2

    x0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    t = fine[:, None, None]
    states = t * mean + variance(t).sqrt() * x0
    left = (std**2 / variance(fine[:, None])).sqrt()  # [401, 3]: what is left of an error at the end
    covectors = (3**0.5 * torch.diag_embed(left))[:, :, None].expand(-1, -1, 2, -1)  # [401, 3, 2, 3]
    walked = Trajectory(fine, states)
    (cost,) = errors(walked, euler_endpoints(fm.drift, walked), [(sqrt, covectors if propagate else None)])

    def objective(times):
        s, e = times[:-1, None], times[1:, None]
        slope = (-(1 - s) + s * std**2) / variance(s)
        error = (1 + (e - s) * slope) * variance(s).sqrt() - variance(e).sqrt()
        if propagate:
            error = error * std / variance(e).sqrt()
        squared = error.square().mean(dim=1)
        return (squared.sqrt() if sqrt else squared).sum()

    for steps in range(2, 9):
        logits = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([logits], max_iter=1000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def grid(logits=logits):
            return torch.cat([torch.zeros(1, dtype=torch.float64), logits.softmax(0).cumsum(0)])

        def closure(logits=logits, grid=grid):
            logits.grad = None
            value = objective(grid())
            value.backward()
            return value

        search.step(closure)
        path, value = solve(cost, steps)
        best = grid().detach()
        assert (fine[path] - best).abs().max() < 0.01, steps
        assert value == pytest.approx(float(objective(best)), rel=0.01)
        assert value == pytest.approx(float(objective(fine[path])), rel=1e-9)


@pytest.mark.parametrize(
    ("cost", "steps", "reason"),
    [
        (torch.zeros(4, 4), 4, "from 1 to the fine grid's 3"),
        (torch.zeros(4, 4), 0, "from 1 to"),
        (torch.zeros(4, 3), 1, "N \\+ 1"),
        (torch.full((4, 4), torch.nan), 2, "not finite"),
    ],
)
def test_what_cannot_be_solved_is_refused(cost, steps, reason):
    with pytest.raises(ValueError, match=reason):
        solve(cost, steps)
