from itertools import pairwise

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map, generator

from flowmaps import FlowMap, FlowMapInfo
from flowmaps.generate import generate
from samplers import SAMPLERS, euler, heun, rollout, stochastic, uniform_times

ORDERS = {euler: 1, heun: 2}


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


@pytest.mark.parametrize("solver", [rollout, euler, heun])
def test_callback_sees_every_state_once(solver):
    fm = gaussian_map()
    x, _ = gaussian_data(fm, 4)
    seen = []
    function = fm if solver is rollout else fm.drift
    end = solver(function, x, uniform_times(3), callback=lambda k, t, state: seen.append((k, float(t), state)))
    assert [k for k, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert torch.equal(seen[0][2], x) and torch.equal(seen[-1][2], end)


@pytest.mark.parametrize("case", CASES)
def test_stochastic_keeps_the_marginals_of_the_exact_map(case):
    """With any gamma the mean and covariance at data time are those of the data; gamma = 0 is the rollout."""
    fm = gaussian_map(*case[:2])
    x0 = fm.base_std * torch.randn(100_000, 3, dtype=torch.float64)
    for gamma in (0.0, 0.6, 1.0):
        g = torch.Generator().manual_seed(1)

        def noise(k, g=g):
            return fm.base_std * torch.randn(x0.shape, dtype=torch.float64, generator=g)

        with torch.no_grad():
            x = stochastic(fm, x0, uniform_times(4), path=fm.interpolant, noise=noise, gamma=gamma)
            if gamma == 0:
                torch.testing.assert_close(x, rollout(fm, x0, uniform_times(4)))
        assert (x.mean(dim=0) - fm.network.mean).abs().max() < 0.03  # standard error 0.006 on the widest axis
        assert (x.std(dim=0) / fm.network.std - 1).abs().max() < 0.012


def test_stochastic_keeps_the_marginal_of_a_grid_that_ends_early():
    fm = gaussian_map()
    x0 = torch.randn(100_000, 3, dtype=torch.float64)
    with torch.no_grad():
        x = stochastic(fm, x0, torch.tensor([0.0, 0.3, 0.6]), path=fm.interpolant, noise=lambda k: torch.randn_like(x0))
    std = (0.4**2 + 0.6**2 * fm.network.std**2).sqrt()
    assert (x.std(dim=0) / std - 1).abs().max() < 0.012


def test_stochastic_is_markov_with_full_renoising():
    """With gamma = 1 the initial noise matters only through the first jump: new noise gives another sample."""
    fm = gaussian_map()
    x0 = torch.randn(5, 3, dtype=torch.float64)
    a, b = (
        stochastic(fm, x0, uniform_times(3), path=fm.interpolant, noise=lambda k, s=s: torch.full_like(x0, s))
        for s in (0.0, 1.0)
    )
    assert (a - b).abs().min() > 0.01
    with pytest.raises(ValueError, match="gamma"):
        stochastic(fm, x0, uniform_times(3), path=fm.interpolant, noise=lambda k: x0, gamma=1.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_per_step(name):
    """The table's number of network evaluations is the true one."""
    calls = []

    class Counter(torch.nn.Linear):
        def forward(self, x, s, t, label=None):
            calls.append(s)
            return x

    fm = FlowMap(Counter(1, 1), info=FlowMapInfo(shape=(3,)))
    list(generate(fm, uniform_times(5), 2, 0, sampler=name))
    assert len(calls) == 5 * SAMPLERS[name].nfe


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_the_batch_size(name):
    fm = gaussian_map("linear" if SAMPLERS[name].linear else "trigonometric", 0.7, classes=True)
    whole, parts = (
        torch.cat([x for x, _ in generate(fm, uniform_times(3), 7, 0, sampler=name, batch=b)]) for b in (7, 3)
    )
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    "times", [[0.0], [[0.0, 1.0]], [0.0, 0.5, 0.5], [1.0, 0.0], [0.0, 1.5], [0.0, float("nan")]], ids=str
)
def test_bad_grids_are_refused(times):
    with pytest.raises(ValueError, match="times must"):
        euler(lambda x, t, label: x, torch.zeros(2, 3), torch.tensor(times))
    with pytest.raises(ValueError, match="times must"):
        euler(lambda x, t, label: x, torch.zeros(2, 3), times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_may_be_a_list(name):
    fm, times = gaussian_map(), [0.0, 0.3, 1.0]
    row, x = SAMPLERS[name], torch.randn(4, 3, dtype=torch.float64, generator=generator())
    options = {"path": fm.interpolant, "noise": lambda k: x} if row.renoises else {}
    model = fm if row.of == "map" else fm.drift
    assert torch.equal(
        row.run(model, x, times, **options), row.run(model, x, torch.tensor(times, dtype=x.dtype), **options)
    )


def test_uniform_times():
    assert uniform_times(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    for steps in (0, -1, 1.5, float("nan"), True, None, 100_001):
        with pytest.raises(ValueError, match="at least 1"):
            uniform_times(steps)
