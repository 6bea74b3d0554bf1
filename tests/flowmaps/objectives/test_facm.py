"""Flow-anchored consistency against the closed-form Gaussian map, in float64."""

import math

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map, generator

from flowmaps import FlowMapInfo, UserError
from flowmaps.objectives import OBJECTIVES
from flowmaps.objectives.facm import cosine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_distilled_from_the_exact_drift_only_the_exact_map_is_right(wrong, case):
    fm, exact = gaussian_map(*case, wrong=wrong), gaussian_map(*case)
    x1, label = gaussian_data(fm, 64)
    loss = OBJECTIVES["facm"]()(fm, x1, label, generator=generator(), teacher=exact.drift)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert exact.network.wrong.grad is None
    if wrong:
        assert loss.value > 1e-3 and gradient.abs() > 1e-2
    else:
        assert loss.value.abs() < 1e-12 and gradient.abs() < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_without_a_teacher_the_exact_map_is_right_in_the_mean(case):
    """dI_s/ds is symmetric about its mean given I_s, and so is the residual, under the clamp and the weight.

    The noise and data of a row, reflected about their means given I_s, have the same I_s and the opposite gradient.
    """
    fm, objective = gaussian_map(*case), OBJECTIVES["facm"]()
    x1, label = gaussian_data(fm, 64)
    draws = objective.draw(fm, x1, generator())
    x = fm.interpolant.point(draws.x0, x1, draws.s)
    m, variance = fm.network.moments(draws.s, label)
    mean = fm.network.mean_of(label)
    a, b = fm.interpolant.alpha(draws.s)[:, None], fm.interpolant.beta(draws.s)[:, None]
    x0_mean = a * fm.base_std**2 / variance * (x - m)
    x1_mean = mean + b * fm.network.std**2 / variance * (x - m)
    gradients = []
    for noise, data in ((draws.x0, x1), (2 * x0_mean - draws.x0, 2 * x1_mean - x1)):
        torch.testing.assert_close(fm.interpolant.point(noise, data, draws.s), x)
        loss = objective.loss(fm, data, label, draws._replace(x0=noise)).value
        gradients += torch.autograd.grad(loss, fm.network.bent)  # of the map's term alone: see the next test
    assert gradients[0].abs() > 1e-4
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_gradient_on_a_wrong_map_pins_the_stop_gradients():
    """v = exact + c (t - s) x has the exact drift, so that c has no gradient but that of the map's term."""
    c, fm, objective = 0.1, gaussian_map(), OBJECTIVES["facm"](adaptive=0.0)
    torch.nn.init.constant_(fm.network.bent, c)
    x1, _ = gaussian_data(fm, 256)
    draws = objective.draw(fm, x1, generator())
    losses = objective.row_losses(fm, x1, None, draws, None, {})
    weighted = OBJECTIVES["facm"]().row_losses(fm, x1, None, draws, None, {})
    (gradient,) = torch.autograd.grad(losses.mean(), fm.network.bent, retain_graph=True)
    s, x0 = draws.s[:, None], draws.x0
    mean, std = fm.network.mean, fm.network.std
    variance, gap = (1 - s) ** 2 + s**2 * std**2, 1 - s
    x, u = (1 - s) * x0 + s * x1, x1 - x0
    b = mean + (-(1 - s) + s * std**2) / variance * (x - s * mean)
    error = 2 * c * gap * x - std / variance.sqrt() * (u - b) - c * gap**2 * u  # mean_flow's residual at t = 1
    residual = (1 - s.sqrt()) * error.clamp(-1, 1)
    jump, weight = residual.square().mean(dim=1), torch.cos(s[:, 0] * math.pi / 2)
    turn = 1 - (b * u).sum(dim=1) / (b.norm(dim=1) * u.norm(dim=1))
    anchor = (b - u).square().mean(dim=1) + turn
    torch.testing.assert_close(losses, anchor + weight * jump)
    torch.testing.assert_close(weighted, anchor + weight * jump / (jump + 1e-3).sqrt())
    torch.testing.assert_close(gradient, (weight[:, None] * 2 * residual * gap * x).mean())
    assert bool((error.abs() > 1).any())
    (gradient,) = torch.autograd.grad(losses.mean(), fm.network.wrong)
    slope = u / (b.norm(dim=1) * u.norm(dim=1))[:, None] - b * ((1 - turn) / b.norm(dim=1) ** 2)[:, None]
    expected = 2 * (b - u).mean(dim=1) - slope.sum(dim=1) + weight * 2 * residual.mean(dim=1)
    torch.testing.assert_close(gradient, expected.mean())


def test_cosine_is_over_channels_and_bounded_at_zero():
    a, b = torch.randn(2, 4, 3, 5, 5, generator=generator())
    by_place = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(cosine(a, b), by_place.mean(dim=(1, 2)))
    zero = torch.zeros(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(cosine(zero, b[:, :, 0, 0]).sum(), zero)
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((4,), 100.0))


def test_times_have_the_stated_law():
    objective = OBJECTIVES["facm"]()
    s, t = objective.off_diagonal_times(torch.rand(2, 1_000_000, generator=generator()), gaussian_map(), 0)
    assert bool((t == 1).all()) and s.min() >= 0 and s.max() <= 1
    assert s.mean() == pytest.approx(0.645, rel=0.002) and (s < 0.1).float().mean() == pytest.approx(0.050, abs=0.001)
    ends, _ = objective.off_diagonal_times(torch.tensor([[0.0, 1 - 2**-24]] * 2), gaussian_map(), 0)
    assert bool(torch.isfinite(ends).all())


def test_a_teacher_and_guidance_exclude_each_other():
    fm = gaussian_map(classes=True)
    fm.info = FlowMapInfo(shape=(3,), num_classes=1)
    x1, label = gaussian_data(fm, 8)
    with pytest.raises(UserError, match="guidance=2"):
        OBJECTIVES["facm"](guidance=2.0)(fm, x1, label, generator=generator(), teacher=fm.drift)
