"""SoFlow and alpha-Flow: their limits, their schedules, and SoFlow's loss as its paper has it, in float64."""

import dataclasses
import math

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map, generator
from helpers.objectives import SMALL_STEPS, expected

from flowmaps import UserError
from flowmaps.objectives import OBJECTIVES
from flowmaps.objectives.base import mean_square
from flowmaps.objectives.self_distillation import OffDiagonalBatch
from flowmaps.objectives.time_sampling import LEAST_GAP


def wrong_map(n=256, bent=0.1):
    """A map that is wrong everywhere, and a batch without diagonal rows."""
    fm = gaussian_map(wrong=0.1)
    torch.nn.init.constant_(fm.network.bent, bent)
    objective = OBJECTIVES["alpha_flow"](diagonal=0.0, target_limit=0.0)
    x1, _ = gaussian_data(fm, n)
    x0, s, t, gamma, *_ = objective.draw(fm, x1, generator())
    x, velocity = fm.interpolant.point(x0, x1, s), fm.interpolant.conditional_velocity(x0, x1, s)
    return fm, objective, OffDiagonalBatch(x0, x1, x, velocity, s, t, gamma, None)


def residual(fm, objective, batch, a):
    gamma = None if a == 0 else torch.full_like(batch.s, a)
    return objective.residual(fm, batch._replace(gamma=gamma), None, {})


def test_the_limit_is_mean_flow_and_a_whole_step_is_flow_matching():
    fm, objective, batch = wrong_map()
    limit = residual(fm, objective, batch, 0)
    assert torch.equal(limit, OBJECTIVES["mean_flow"](diagonal=0.0).residual(fm, batch, None, {}))
    errors = [(residual(fm, objective, batch, a) / a - limit).norm().item() for a in (4e-3, 2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02) and errors[1] / errors[2] == pytest.approx(2, rel=0.01)
    assert errors[2] < 0.01 * limit.norm()
    v = fm.velocity(batch.x, batch.s, batch.t)
    torch.testing.assert_close(residual(fm, objective, batch, 1.0), v - batch.conditional_velocity)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SMALL_STEPS)
def test_the_mean_residual_at_the_exact_map_is_that_of_an_euler_step(name, case):
    """With dI_s/ds replaced by its mean given I_s, r is O(a^2), and 0 where the derivative replaces the step."""
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 64)
    objective = OBJECTIVES[name](diagonal=0.0, **({} if name == "soflow" else {"target_limit": 0.0}))
    draws = objective.draw(fm, x1, generator())
    fm.interpolant = expected(fm, x1, label, draws)
    sizes = []
    for a in (8e-3, 4e-3, 2e-3):
        given = draws._replace(gamma=torch.full_like(draws.s, a))
        sizes.append(objective.row_losses(fm, x1, label, given, None, {}).mean().sqrt().item())
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.03) and sizes[1] / sizes[2] == pytest.approx(4, rel=0.02)
    loss = objective.loss(fm, x1, label, draws._replace(gamma=None))
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value < 1e-16 and gradient.abs() < 1e-8


@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
def test_soflow_has_the_gradient_of_its_papers_loss(p):
    """Which is sg[q / (|q|^2 + c)^p] . v with the difference quotient q of the two maps, and q = r / a."""
    fm, _, batch = wrong_map()
    objective, c = OBJECTIVES["soflow"](diagonal=0.0, adaptive=p), 0.01
    draws = objective.draw(fm, batch.x1, generator())
    share = draws.gamma * torch.rand(256, generator=generator(1), dtype=torch.float64)
    draws = draws._replace(gamma=share)
    s, t, a = draws.s, draws.t, draws.gamma
    m = s + a * (t - s)
    x = fm.interpolant.point(draws.x0, batch.x1, s)
    x_m = x + (m - s)[:, None] * fm.interpolant.conditional_velocity(draws.x0, batch.x1, s)
    v = fm.velocity(x, s, t)
    q = ((fm(x, s, t) - fm(x_m, m, t)) / (m - s)[:, None]).detach()
    theirs = (((q * v).mean(dim=1)) / (mean_square(q) + c) ** p).mean()
    ours = objective.loss(fm, batch.x1, None, draws).value
    parameters = (fm.network.wrong, fm.network.bent)
    for ours_d, theirs_d in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(ours_d, theirs_d, rtol=1e-6, atol=1e-12)


def test_soflows_step_is_geometric_and_no_gap_is_below_the_least():
    objective, fm = OBJECTIVES["soflow"]().for_run(100), gaussian_map()
    shares = [objective.alpha(step) for step in (0, 50, 100, 200)]
    assert shares == pytest.approx([0.1, math.sqrt(0.1 * 0.002), 0.002, 0.002])
    x1, _ = gaussian_data(fm, 40_000)
    draws = dataclasses.replace(objective, diagonal=0.0).draw(fm, x1, generator(), step=100)
    step = draws.gamma * (draws.t - draws.s)
    assert step.min() == pytest.approx(LEAST_GAP) and draws.gamma.max() <= 1
    assert torch.equal(draws.gamma[step > 1.01 * LEAST_GAP].unique(), torch.tensor([0.002], dtype=torch.float64))


def test_alpha_flow_falls_along_a_sigmoid_between_its_ends():
    objective = OBJECTIVES["alpha_flow"](ramp=(0.5, 0.75)).for_run(1000)
    for p in (0.4, 0.5, 0.6):
        assert objective.alpha(500 + round(250 * p)) == pytest.approx(1 - 1 / (1 + math.exp(-25 * (p - 0.5))))
    shares = [objective.alpha(step) for step in range(1001)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    inside = [a for a in shares if 0 < a < 1]
    assert min(inside) >= 0.005 and max(inside) <= 0.995 and len(inside) == pytest.approx(106, abs=2)
    fm = gaussian_map()
    x1, _ = gaussian_data(fm, 8)
    assert objective.draw(fm, x1, generator(), 1000).gamma is None
    assert objective.draw(fm, x1, generator(), 0).gamma.tolist() == [1.0] * 8


def test_alpha_flow_limits_its_target():
    fm, objective, batch = wrong_map()
    free = fm.velocity(batch.x, batch.s, batch.t) - residual(fm, objective, batch, 0.5)
    limited = dataclasses.replace(objective, target_limit=2.0)
    seen = fm.velocity(batch.x, batch.s, batch.t) - residual(fm, limited, batch, 0.5)
    torch.testing.assert_close(seen, free.clamp(-2, 2))
    assert free.abs().max() > 2


@pytest.mark.parametrize("name", SMALL_STEPS)
def test_the_schedule_is_that_of_the_run_unless_it_has_its_own_length(name):
    fm, objective = gaussian_map(), OBJECTIVES[name]()
    x1, _ = gaussian_data(fm, 8)
    objective.draw(fm, x1, generator())  # the first step needs no length
    with pytest.raises(UserError, match="alpha_steps=0"):
        objective.draw(fm, x1, generator(), step=1)
    assert objective.for_run(70).alpha_steps == 70
    assert dataclasses.replace(objective, alpha_steps=7).for_run(70).alpha_steps == 7
