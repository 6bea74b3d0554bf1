"""A drawn interval of guidance: its law, what the network receives, and the exact Gaussian map that knows it."""

import pytest
import torch
from helpers import generator
from helpers.guided import CLASSES, DRAWN, Guided
from helpers.small_networks import small
from torch import nn

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.networks.conditioning import guidance_at, with_guidance
from flowmaps.objectives import OBJECTIVES, LogVariance
from flowmaps.objectives.eulerian import StopGradient

EXACT = {  # residuals that vanish at the exact map, MeanFlow's only in the mean over (x0, x1) given I_s
    "lagrangian": ("lagrangian", {}),
    "eulerian": ("eulerian", {}),
    "eulerian slim": ("eulerian", {"stop": StopGradient.slim}),
    "progressive": ("progressive", {}),
    "shortcut": ("shortcut", {}),
    "terminal_velocity": ("terminal_velocity", {"guidance_mix": 0.5}),
}
IN_THE_MEAN = {"mean_flow": ("mean_flow", {}), "improved_mean_flow": ("improved_mean_flow", {})}


def example(n=64):
    """The exact map, data, labels of which every fourth is "no label"; draws are diagonal rows first."""
    fm = FlowMap(Guided(), info=FlowMapInfo(shape=(3,), num_classes=CLASSES))
    label = torch.arange(n) % 4 % 3
    x1 = fm.network.mean[label] + fm.network.std * torch.randn(n, 3, generator=generator(), dtype=torch.float64)
    return fm, x1, label


def gradients(objective, fm, x1, label, draws, weight=None):
    """The loss and its gradient by the errors of the map."""
    loss = objective.loss(fm, x1, label, draws, weight=weight).value
    return loss, torch.autograd.grad(loss, [fm.network.wrong, fm.network.bent])


def test_the_interval_has_its_law_and_the_weight_applies_inside():
    objective = OBJECTIVES["improved_mean_flow"](diagonal=0.5, **DRAWN)
    fm, n = example()[0], 200_000
    draws = objective.draw(fm, torch.zeros(2 * n, 3, dtype=torch.float64), generator())
    w, low, high = draws.told.unbind(dim=1)
    assert bool((low[:n] == 0).all() and (high[:n] == 1).all()) and torch.equal(draws.guidance[:n], w[:n])
    for value, least in ((low[n:], 0.0), (high[n:], 0.5)):  # uniform on halves of [0, 1], independent of each other
        assert value.min() >= least and value.max() <= least + 0.5
        assert abs(value.mean() - least - 0.25) < 4 * 0.5 / (12 * n) ** 0.5
        assert abs(value.var() * 48 - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([low[n:], high[n:]]))[0, 1]) < 4 / n**0.5
    inside = (low <= draws.s) & (draws.s <= high)
    assert torch.equal(draws.guidance, torch.where(inside, w, 1.0)) and bool((w > 1).all())
    assert 0.5 < inside[n:].double().mean() < 0.9


def test_without_the_option_nothing_else_is_drawn():
    """The interval comes last, so that noise, times and weights of a run stay the same."""
    fm, x1, _ = example()
    plain = OBJECTIVES["mean_flow"](guidance_max=8.0).draw(fm, x1, generator())
    drawn = OBJECTIVES["mean_flow"](**DRAWN).draw(fm, x1, generator())
    assert plain.told is None and torch.equal(plain.guidance, drawn.told[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], drawn[:4], strict=True))


def test_the_network_is_told_the_draws_and_the_target_has_the_weight_at_s():
    """Rows without a label keep what was drawn, and regress dI_s/ds."""
    fm, x1, label = example()
    objective = OBJECTIVES["improved_mean_flow"](diagonal=0.25, **DRAWN)
    draws = objective.draw(fm, x1, generator())
    x_s, target, given = objective.conditional(fm, x1, label, draws)
    assert torch.equal(given[:, -3:], draws.told) and torch.equal(given[:, :-3].argmax(dim=1), label)
    velocity, w = x1 - draws.x0, draws.guidance[:, None]
    u = fm.drift(x_s, draws.s, torch.full_like(label, CLASSES))
    c = w * fm.drift(x_s, draws.s, label) + (1 - w) * u
    expected = torch.where((label == CLASSES)[:, None], velocity, velocity + (1 - 1 / w) * (c - u))
    torch.testing.assert_close(target, expected)
    outside = (draws.guidance == 1) & (label != CLASSES)
    assert bool(outside.any()) and torch.equal(target[outside], velocity[outside])


def test_the_drift_in_a_target_has_the_weight_at_its_own_time():
    fm, x1, label = example(4)
    told = torch.tensor([[3.0, 0.2, 0.6]], dtype=torch.float64).expand(4, 3)
    rows, t = with_guidance(label, told, CLASSES), torch.tensor([0.1, 0.2, 0.6, 0.7], dtype=torch.float64)
    assert guidance_at(rows, t)[:, -1].tolist() == [1, 3, 3, 1]
    objective = OBJECTIVES["improved_mean_flow"](**DRAWN)
    torch.testing.assert_close(objective.target_drift(fm, None, x1, t, rows), fm.drift(x1, t, rows))
    seen = []
    objective.target_drift(fm, lambda x, t, label: seen.append(label) or x, x1, t, rows)
    assert torch.equal(seen[0], guidance_at(rows, t))


@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradient_vanish_at_the_exact_map(name):
    key, options = EXACT[name]
    fm, x1, label = example()
    objective = OBJECTIVES[key](diagonal=0.0, **options, **DRAWN)
    loss, gradient = gradients(objective, fm, x1, label, objective.draw(fm, x1, generator()))
    assert loss < 1e-16 and max(g.abs() for g in gradient) < 1e-7
    nn.init.constant_(fm.network.bent, 0.1)
    assert gradients(objective, fm, x1, label, objective.draw(fm, x1, generator()))[0] > 1e-4


@pytest.mark.parametrize("form", ["square", "adaptive", "logarithmic"])
@pytest.mark.parametrize("name", IN_THE_MEAN)
def test_the_mean_gradient_vanishes_at_the_exact_map(name, form):
    """Each row has a partner of the same I_s whose dI_s/ds lies as far on the other side of the drift."""
    key, options = IN_THE_MEAN[name]
    fm, x1, label = example()
    objective = OBJECTIVES[key](diagonal=0.25, adaptive=float(form == "adaptive"), **options, **DRAWN)
    weight = LogVariance(log_floor=0.01) if form == "logarithmic" else None
    draws = objective.draw(fm, x1, generator())
    s = draws.s[:, None]
    x_s = (1 - s) * draws.x0 + s * x1
    with torch.no_grad():
        other = 2 * fm.drift(x_s, draws.s, label) - (x1 - draws.x0)
    reflected = draws._replace(x0=x_s - s * other)
    _, (wrong, bent) = gradients(objective, fm, x1, label, draws, weight)
    _, partner = gradients(objective, fm, x_s + (1 - s) * other, label, reflected, weight)
    assert abs(wrong) > 1e-3 and abs(bent) > 1e-4
    torch.testing.assert_close(torch.stack(partner), -torch.stack([wrong, bent]), rtol=1e-7, atol=1e-9)


def test_at_weight_one_improved_mean_flow_is_the_one_without_guidance():
    fm, x1, label = example()
    nn.init.constant_(fm.network.bent, 0.1)
    told, plain = (OBJECTIVES["improved_mean_flow"](**options) for options in (DRAWN, {}))
    draws = told.draw(fm, x1, generator())
    one = draws._replace(
        guidance=torch.ones_like(draws.s), told=torch.cat([draws.told[:, :1] ** 0, draws.told[:, 1:]], 1)
    )
    ours = gradients(told, fm, x1, label, one)
    theirs = gradients(plain, fm, x1, label, draws._replace(guidance=None, told=None))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["UNet", "EDM2UNet", "DiT", "IMFDiT"])
def test_a_network_takes_the_interval_and_all_times_are_neutral(name):
    fm = small(name, guidance_interval=True).double().eval()
    x, label = torch.randn(6, *fm.info.shape, dtype=torch.float64, generator=generator()), torch.arange(6) % 5
    s, t = torch.rand(2, 6, dtype=torch.float64, generator=generator()).sort(dim=0).values
    w = torch.linspace(1, 3, 6, dtype=torch.float64)

    def at(low, high):
        told = torch.stack([w, torch.full_like(w, low), torch.full_like(w, high)], dim=1)
        return fm.velocity(x, s, t, with_guidance(label, told, 4))

    neutral = fm.velocity(x, s, t, with_guidance(label, w, 4))
    torch.testing.assert_close(at(0.0, 1.0), neutral, rtol=0, atol=0)
    for changed in (at(0.3, 1.0), at(0.0, 0.7)):
        assert (changed - neutral).abs().amin(dim=(1, 2, 3)).gt(0).all()
    with pytest.raises(ValueError, match="guidance_interval=True"):
        fm.velocity(x, s, t, with_guidance(label, torch.ones(6, 2), 4))
    with pytest.raises(ValueError, match="guidance_interval needs guidance"):
        small(name, guidance=False, guidance_interval=True)


@pytest.mark.parametrize("name", ["UNet", "EDM2UNet", "DiT"])
def test_a_network_without_becomes_one_with_the_interval_and_stays_the_same_function(name):
    plain, told = small(name).eval(), small(name, guidance_interval=True).eval()
    assert told.fingerprint() != plain.fingerprint()
    fresh = type(told.network)(**{k: v for k, v in told.network.config.items() if not k.startswith("_")})
    missing, unexpected = fresh.load_state_dict(plain.network.state_dict(), strict=False)
    assert not unexpected and all(
        key.startswith(("embedding.low", "embedding.high", "embedding.gains")) for key in missing
    )
    x, label = torch.randn(3, 1, 8, 8, generator=generator()), torch.arange(3)
    rows = with_guidance(label, torch.tensor([[2.0, 0.2, 0.7]] * 3), 4)
    s, t = torch.rand(2, 3, generator=generator()).sort(dim=0).values
    same = plain.velocity(x, s, t, with_guidance(label, torch.full((3,), 2.0), 4))
    assert torch.equal(fresh.eval()(x, s, t, rows), same)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"guidance_max": 2.0, "guidance_times": (0.2, 0.7)}])
def test_an_interval_without_a_drawn_weight_or_beside_a_fixed_one_is_refused(options):
    with pytest.raises(UserError, match="guidance_interval=True: needs guidance_max above 1, and excludes"):
        OBJECTIVES["lagrangian"](guidance_interval=True, **options)


def test_network_and_objective_must_agree():
    from configs.digits import get_config

    config = get_config("lagrangian_guided,smoke")
    config.objective.guidance_interval = True
    with pytest.raises(UserError, match=r"objective\.guidance_interval=True: needs network\.guidance_interval=True"):
        config.validate()
    config.network.guidance_interval = True
    config.validate()
    config.objective.guidance_interval = False
    with pytest.raises(UserError, match=r"needs network\.guidance_interval=False"):
        config.validate()
