"""Every objective of the table against the closed-form Gaussian map, in float64."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.derivatives import velocity_difference, velocity_jvp
from flowmaps.networks import MLP, UNet
from flowmaps.objectives import OBJECTIVES, LogVariance
from flowmaps.objectives.eulerian import Stop
from flowmaps.objectives.lagrangian import Derivative
from flowmaps.objectives.progressive import Middle

MAPS = [name for name, cls in OBJECTIVES.items() if cls.kind == "map"]
CONDITIONAL = ("mean_flow", "improved_mean_flow")  # targets are right in the mean over (x0, x1) given I_s only
SELF_DISTILLED = {
    **{name: {} for name in MAPS if name not in CONDITIONAL},
    "lagrangian-slim": {"slim": True},
    "eulerian-velocity": {"stop": Stop.velocity},
    "eulerian-slim": {"stop": Stop.slim},
    "progressive-uniform": {"middle": Middle.uniform},
}


def made(name, **options):
    """The objective of a variant's name, "eulerian-slim"."""
    return OBJECTIVES[name.partition("-")[0]](**SELF_DISTILLED.get(name, {}), **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_residual_and_gradient_vanish_at_the_exact_map(name, case):
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 64)
    loss = made(name, diagonal=0.0)(fm, x1, label, generator=generator())
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value < 1e-16 and gradient.abs() < 1e-8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_residual_and_gradient_are_positive_off_it(name, case):
    fm = gaussian_map(*case, wrong=0.1)
    x1, label = gaussian_data(fm, 64)
    loss = made(name, diagonal=0.0)(fm, x1, label, generator=generator())
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value > 1e-5 and gradient.abs() > 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_diagonal_term_is_flow_matching(name, case):
    """Its value at the exact drift is the conditional variance of dI_t, and a wrong drift adds its squared error."""
    terms = {}
    for wrong in (0.0, 0.1):
        fm = gaussian_map(*case, wrong=wrong)
        x1, label = gaussian_data(fm, 4000)
        terms[wrong] = OBJECTIVES[name]()(fm, x1, label, generator=generator()).terms["diagonal"]
    rows = OBJECTIVES[name]().diagonal_rows(4000)
    spread = 6 * 0.1 * terms[0.0].sqrt() / rows**0.5  # six standard errors of the cross term
    assert abs(terms[0.1] - terms[0.0] - 0.01) < spread


def by_hand(name, fm, x, s, t, g, c):
    """(r, dr/dc of the student) where v = exact + c (t - s) x: the drift is exact, the map is bent.

    A is the slope of the exact drift, so b(y + d) = b(y) + A d; e that of the exact map, so grad v = (e - 1) / gap.
    """
    mean, std = fm.network.mean, fm.network.std
    gap, u = t - s, g * s + (1 - g) * t

    def variance(time):
        return (1 - time) ** 2 + time**2 * std**2

    def slope(a, b):
        return (variance(b) / variance(a)).sqrt()

    A_s, A_t = ((-(1 - time) + time * std**2) / variance(time) for time in (s, t))
    b = mean + A_s * (x - s * mean)
    if name.startswith(("lagrangian", "terminal_velocity")):  # d_t X = b(X*) + 2 gap c x, and X = X* + gap^2 c x
        return c * (2 * gap * x - A_t * gap**2 * x), (1 if name.endswith("slim") else 2) * gap * x
    if name.startswith("eulerian"):  # d_s X = d_s X* - 2 gap c x, and grad X . b = e b + gap^2 c b
        student = {
            "eulerian": -2 * gap * x,
            "eulerian-velocity": -2 * gap * x + gap**2 * b,
            "eulerian-slim": gap * x,
        }[name]
        sign = -1 if name == "eulerian-slim" else 1
        return sign * c * (gap**2 * b - 2 * gap * x), student
    half = u * mean + slope(s, u) * (x - s * mean)  # X*_{s,u}(x); the bent one is (u - s)^2 c x further
    bend = (u - s) ** 2 * c * x
    second = (slope(u, t) - 1) / (t - u) * bend + c * (t - u) * (half + bend)
    return c * gap * x - (1 - g) * c * (u - s) * x - g * second, gap * x


@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_gradient_on_a_wrong_map_pins_the_stop_gradients(name):
    """d(mean r^2)/dc = mean(2 r dr/dc) with the derivative of the student's part alone."""
    c, objective = 0.1, made(name, diagonal=0.0)
    fm = gaussian_map()
    torch.nn.init.constant_(fm.network.bent, c)
    x1, _ = gaussian_data(fm, 256)
    draws = objective.draw(fm, x1, generator())
    loss = objective.loss(fm, x1, None, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.bent)
    s, t, g = draws.s[:, None], draws.t[:, None], draws.fraction[:, None]
    g = g if name == "progressive-uniform" else torch.full_like(g, 0.5)
    residual, student = by_hand(name, fm, fm.interpolant.point(draws.x0, x1, draws.s), s, t, g, c)
    torch.testing.assert_close(loss.value.detach(), residual.square().mean())
    torch.testing.assert_close(gradient, (2 * residual * student).mean())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["flow_matching", *CONDITIONAL])
def test_conditional_targets_are_right_in_the_mean(name, case):
    """With the conditional velocity replaced by its expectation given I_s, loss and gradient vanish at the truth."""
    fm, objective = gaussian_map(*case), OBJECTIVES[name]()
    x1, label = gaussian_data(fm, 64)
    draws = objective.draw(fm, x1, generator())
    x_s = fm.interpolant.point(draws.x0, x1, draws.s)

    class Expected(type(fm.interpolant)):
        def point(self, x0, x1, t):
            return x_s

        def velocity(self, x0, x1, t):
            return fm.drift(x_s, t, label).detach()

    fm.interpolant = Expected()
    loss = objective.loss(fm, x1, label, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value < 1e-16 and gradient.abs() < 1e-8


def test_shortcut_times_are_dyadic_and_cover_every_step():
    objective = OBJECTIVES["shortcut"](levels=4)
    s, t = objective.times(torch.rand(2, 4000, generator=generator(), dtype=torch.float64))
    seen = {(float(a), float(b)) for a, b in zip(s, t, strict=True)}
    assert seen == {(j * 2.0**-k, (j + 1) * 2.0**-k) for k in range(4) for j in range(2**k)}
    for k in range(4):
        assert abs((t - s == 2.0**-k).double().mean() - 0.25) < 0.03


def test_finite_difference_converges_with_second_order_and_refuses_half_precision():
    torch.manual_seed(0)
    network = UNet(8, 1, 8, (1,), 1, ()).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    fm, x1 = FlowMap(network), torch.randn(16, 1, 8, 8, dtype=torch.float64)
    s, t = 0.4 * torch.rand(16, dtype=torch.float64), 0.5 + 0.4 * torch.rand(16, dtype=torch.float64)
    v, exact = velocity_jvp(fm, x1, s, t, dt=1.0)
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        near, slope = velocity_difference(fm, x1, s, t, step=step)
        errors.append(((slope - exact).norm() / exact.norm()).item())
        assert (near - v).norm() < 1e-3 * v.norm()
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    with pytest.raises(UserError, match="derivative=exact"), torch.autocast("cpu", torch.bfloat16):
        OBJECTIVES["lagrangian"](derivative=Derivative.finite)(fm, x1, generator=generator())


@pytest.mark.parametrize("name", [name for name in SELF_DISTILLED if name[:11] not in ("progressive", "shortcut")])
def test_teacher_replaces_the_live_network_and_gets_no_gradient(name):
    fm, teacher = gaussian_map(wrong=0.1), gaussian_map()
    x1, _ = gaussian_data(fm, 32)
    live = made(name)(fm, x1, generator=generator())
    taught = made(name)(fm, x1, generator=generator(), teacher=teacher.drift)
    assert live.value != taught.value
    taught.value.backward()
    assert teacher.network.wrong.grad is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_are_uniform_and_keyed_by_the_generator(name):
    fm, objective = gaussian_map(), OBJECTIVES[name]()
    x1, _ = gaussian_data(fm, 4000)
    x0, s, t, fraction = objective.draw(fm, x1, generator(5))
    rows = objective.diagonal_rows(4000)
    assert torch.equal(s[:rows], t[:rows]) and bool((s[rows:] < t[rows:]).all())
    assert abs(s[:rows].mean() - 0.5) < 0.03 and abs(x0.std() - fm.base_std) < 0.03
    assert abs(fraction.mean() - 0.5) < 0.03
    if rows < 4000 and name != "shortcut":  # min and max of two uniforms
        assert abs(s[rows:].mean() - 1 / 3) < 0.04 and abs(t[rows:].mean() - 2 / 3) < 0.04
    again = objective.draw(fm, x1, generator(5))
    assert all(torch.equal(a, b) for a, b in zip((x0, s, t, fraction), again, strict=True))


def test_loss_is_the_joint_mean_of_the_paper_share():
    fm = gaussian_map(wrong=0.3)
    x1, _ = gaussian_data(fm, 40)
    loss = OBJECTIVES["lagrangian"]()(fm, x1, generator=generator())
    expected = 0.75 * loss.terms["diagonal"] + 0.25 * loss.terms["off_diagonal"]
    torch.testing.assert_close(loss.value.detach(), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dropout_acts_on_the_diagonal_term_only(name):
    torch.manual_seed(0)
    network = UNet(
        image_size=8, channels=1, width=8, channel_mult=(1,), blocks=1, attention_resolutions=(), dropout=0.5
    )
    torch.nn.init.normal_(network.head[-1].weight)
    for block in network.down:
        torch.nn.init.normal_(block.conv2.weight)
    fm = FlowMap(network.train(), info=FlowMapInfo(shape=(1, 8, 8)))
    x1, objective = torch.randn(16, 1, 8, 8), OBJECTIVES[name]()
    losses = [objective(fm, x1, generator=generator()) for _ in range(2)]  # same draws, other dropout masks
    assert losses[0].terms["diagonal"] != losses[1].terms["diagonal"]
    if "off_diagonal" in losses[0].terms:
        assert losses[0].terms["off_diagonal"] == losses[1].terms["off_diagonal"]
    assert all(m.training for m in network.modules())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_learned_weight_leaves_the_logged_terms_alone(name):
    torch.manual_seed(0)
    fm = FlowMap(MLP(width=16, depth=2))
    x1, weight = torch.randn(64, 2), LogVariance(limit=2.0)
    plain = OBJECTIVES[name]()(fm, x1, generator=generator())
    torch.nn.init.constant_(weight.linear.bias, 1.0)
    weighted = OBJECTIVES[name]()(fm, x1, generator=generator(), weight=weight)
    w = 2 * torch.tanh(torch.tensor(0.5))
    torch.testing.assert_close(weighted.value, plain.value * torch.exp(-w) + w)
    assert weighted.terms["diagonal"] == plain.terms["diagonal"]
    torch.nn.init.constant_(weight.linear.bias, -99.0)
    assert weight(torch.rand(3), torch.rand(3)).tolist() == [-2.0] * 3  # the limit


@pytest.mark.parametrize("name", OBJECTIVES)
def test_adaptive_weight_divides_by_a_constant_power(name):
    """One row a batch: the loss is r^2 / (3 r^2 + 1e-3)^p and its gradient that of r^2 over the same constant."""
    fm, c = gaussian_map(wrong=0.3), 1e-3
    x1, _ = gaussian_data(fm, 1)
    plain, weighted = (OBJECTIVES[name](adaptive=p)(fm, x1, generator=generator()) for p in (0.0, 0.75))
    constant = (3 * plain.value.detach() + c) ** 0.75
    torch.testing.assert_close(weighted.value, plain.value / constant)
    gradients = [torch.autograd.grad(loss.value, fm.network.wrong)[0] for loss in (plain, weighted)]
    torch.testing.assert_close(gradients[1], gradients[0] / constant)
    with pytest.raises(UserError, match="adaptive"):
        OBJECTIVES[name](adaptive=-1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_loss_equals_eager(name):
    """fullgraph: no graph break, the derivative included."""
    torch.manual_seed(0)
    network = UNet(
        image_size=8, channels=1, width=8, channel_mult=(1, 2), blocks=1, attention_resolutions=(4,), num_classes=3
    )
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    fm, objective = FlowMap(network.train()), OBJECTIVES[name]()
    x1, label = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    draws = objective.draw(fm, x1, generator())

    def gradient(loss):
        return torch.autograd.grad(loss(fm, x1, label, draws).value, list(fm.parameters()), allow_unused=True)

    compiled = torch.compile(objective.loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(compiled), gradient(objective.loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_frozen_and_refuse_a_bad_share(name):
    objective = OBJECTIVES[name]()
    with pytest.raises(FrozenInstanceError):
        objective.diagonal = 0.5
    if name in MAPS:
        with pytest.raises(UserError, match="diagonal"):
            OBJECTIVES[name](diagonal=1.5)
