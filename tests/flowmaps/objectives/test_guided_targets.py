"""Guided targets on rows whose drift, spread and guided drift are known."""

import math

import pytest
import torch
from helpers.small_networks import small

from flowmaps import UserError
from flowmaps.objectives import OBJECTIVES
from samplers.callables import expand

ROWS, B, U, SPREAD = 400_000, 1.5, -0.5, 0.7  # b(x; label), b(x; no label), deviation of dI_s/ds given I_s
FORMS = {  # options, and omega(w)
    "plain": ({"guidance_mix": 0.0}, lambda w: w),
    "half": ({"guidance_mix": 0.5}, lambda w: w / 2),
    "mean_flow_xl": ({"guidance_mix": 0.92}, lambda w: 0.08 * w),
    "told": ({"told": True}, lambda w: 1.0),
    "told_plain": ({"told": True, "guidance_mix": 0.0}, lambda w: w),
}


NOTHING = 4  # "no label" of the small networks


def drift_at(w):
    """Return the drift that has learned guidance w: it reads a told weight from the label's last column."""

    def drift(x, s, label):
        classes = label if label.ndim == 1 else label[:, :-1].argmax(dim=1)
        told = torch.full_like(s, w) if label.ndim == 1 else label[:, -1]
        return expand(torch.where(classes == NOTHING, U, told * B + (1 - told) * U), x).expand_as(x)

    return drift


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("w", [1.5, 2.5, 4.0, 8.0])
def test_the_mean_of_the_target_is_the_guided_drift_and_its_variance_omega_squared(form, w):
    options, omega = FORMS[form]
    told = options.get("told", False)
    options = {key: value for key, value in options.items() if key != "told"}
    objective = OBJECTIVES["mean_flow"](**options, **{"guidance_max" if told else "guidance": w})
    generator = torch.Generator().manual_seed(0)
    velocity = B + SPREAD * torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    x, s = torch.zeros_like(velocity), torch.full((ROWS,), 0.5, dtype=torch.float64)
    label = torch.zeros(ROWS, dtype=torch.int64)
    label[0] = NOTHING
    target, given = objective.guided_target(small("DiT"), x, s, label, velocity, torch.full_like(s, w), drift_at(w))
    assert target[0] == velocity[0]
    target = target[1:]
    guided, deviation = w * B + (1 - w) * U, omega(w) * SPREAD
    assert abs(target.mean() - guided) < 4 * deviation / math.sqrt(ROWS)
    assert target.var() / SPREAD**2 == pytest.approx(omega(w) ** 2, rel=0.02)
    print(f"{form} w={w}: {target.var() / SPREAD**2:.2f}")
    assert given.is_floating_point() == told
    if told:
        assert given[0].tolist() == [0, 0, 0, 0, 1, 1] and given[1].tolist() == [1, 0, 0, 0, 0, w]


@pytest.mark.parametrize(
    ("power", "mean", "median"), [(0, 4.5, 4.5), (1, 7 / math.log(8), math.sqrt(8)), (2, 8 / 7 * math.log(8), 16 / 9)]
)
def test_drawn_weights_have_their_law(power, mean, median):
    objective = OBJECTIVES["improved_mean_flow"](guidance_max=8.0, guidance_power=float(power))
    w = objective.guidance_weights(torch.arange(0.5, 1e6, dtype=torch.float64) / 1e6)
    assert w.min() >= 1 and w.max() <= 8
    assert w.mean() == pytest.approx(mean, rel=1e-4) and w.median() == pytest.approx(median, rel=1e-4)


def labelled_data(n=64):
    x1 = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return small("DiT").double().eval(), x1, torch.where(torch.arange(n) % 2 == 0, 0, NOTHING)


def test_rows_outside_the_interval_and_without_a_label_are_not_guided():
    fm, x1, label = labelled_data()
    objective = OBJECTIVES["mean_flow"](guidance=3.0, guidance_times=(0.2, 0.6))
    draws = objective.draw(fm, x1, torch.Generator().manual_seed(0))
    inside = (draws.s >= 0.2) & (draws.s <= 0.6)
    assert torch.equal(draws.guidance, torch.where(inside, 3.0, 1.0).double()) and 0 < inside.sum() < 64
    _, target, _ = objective.conditional(fm, x1, label, draws)
    plain = fm.interpolant.conditional_velocity(draws.x0, x1, draws.s)
    assert torch.equal((target != plain).flatten(1).any(dim=1), inside & (label == 0))


def test_terminal_velocity_divides_guided_losses_by_the_square_of_the_weight():
    """And takes the drift without a label from the average of the weights."""
    (fm, x1, label), w = labelled_data(16), 2.0
    guided, plain = (OBJECTIVES["terminal_velocity"](guidance=value) for value in (w, 1.0))
    draws = guided.draw(fm, x1, torch.Generator().manual_seed(0))
    teacher, rows = drift_at(w), guided.diagonal_rows(16)
    losses = guided.row_losses(fm, x1, label, draws, teacher, {})
    x_s = fm.interpolant.point(draws.x0, x1, draws.s)
    velocity = fm.interpolant.conditional_velocity(draws.x0, x1, draws.s)
    target = torch.where(expand(label == 0, x1), U + w * (velocity - U), velocity)
    expected = (fm.drift(x_s, draws.s, label) - target).square().flatten(1).mean(dim=1)
    scale = torch.where(label == 0, w**2, 1.0)
    assert torch.allclose(losses[:rows], (expected / scale)[:rows], rtol=1e-6)
    off = plain.row_losses(fm, x1, label, draws._replace(guidance=None), teacher, {})
    assert torch.allclose(losses[rows:], (off / scale)[rows:], rtol=1e-6)


@pytest.mark.parametrize("options", [{"guidance": 2.0, "guidance_mix": 1.0}, {"guidance_mix": -0.1}])
def test_a_share_of_all_or_less_than_none_is_refused(options):
    with pytest.raises(UserError, match="guidance_mix"):
        OBJECTIVES["mean_flow"](**options)
