"""Every objective of the table against the closed-form Gaussian map, in float64."""

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map, generator
from helpers.objectives import ANCHORED, LIVE, MAPS, SMALL_STEPS, expected

from flowmaps import FlowMap, UserError
from flowmaps.derivatives import velocity_difference, velocity_jvp
from flowmaps.networks import UNet
from flowmaps.objectives import OBJECTIVES, Draws
from flowmaps.objectives.eulerian import StopGradient
from flowmaps.objectives.progressive import IntermediateTime

CONDITIONAL = ("mean_flow", "improved_mean_flow")  # targets are right in the mean over (x0, x1) given I_s only
SELF_DISTILLED = {
    **{name: {} for name in MAPS if name not in (*CONDITIONAL, *SMALL_STEPS)},
    "lagrangian-slim": {"slim": True},
    "eulerian-velocity": {"stop": StopGradient.velocity},
    "eulerian-slim": {"stop": StopGradient.slim},
    "progressive-uniform": {"middle": IntermediateTime.uniform},
}


def made(name, **options):
    """The objective of a variant's name, "eulerian-slim"."""
    return OBJECTIVES[name.partition("-")[0]](**SELF_DISTILLED.get(name, {}), **options)


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
@pytest.mark.parametrize("name", ANCHORED)
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


def by_hand(name, fm, x0, x1, s, t, g, c):
    """(r, dr/dc of the student) where v = exact + c (t - s) x: the drift is exact, the map is bent.

    b, A: the exact drift and its slope, b(y + d) = b(y) + A d; e: the slope of the exact map, grad v = (e - 1) / gap.
    """
    mean, std = fm.network.mean, fm.network.std
    gap, u, x, velocity = t - s, g * s + (1 - g) * t, (1 - s) * x0 + s * x1, x1 - x0

    def variance(time):
        return (1 - time) ** 2 + time**2 * std**2

    def slope(a, b):
        return (variance(b) / variance(a)).sqrt()

    def exact(y, a, b):
        return b * mean + slope(a, b) * (y - a * mean)

    A_s, A_t = ((-(1 - time) + time * std**2) / variance(time) for time in (s, t))
    b = mean + A_s * (x - s * mean)
    if name == "flow_matching":
        return b - velocity, 0 * x
    if name == "consistency":  # t is the time of the target, x_t a point of the same path
        x_t = (1 - t) * x0 + t * x1
        sigmas = (1 - s) / s - (1 - t) / t
        bend = c * ((1 - s) ** 2 * x - (1 - t) ** 2 * x_t)
        return (exact(x, s, 1) - exact(x_t, t, 1) + bend) / sigmas, (1 - s) ** 2 * x / sigmas
    if name in SMALL_STEPS:  # (1 - g) / (t - m) = 1 / gap
        m, x_m = s + g * gap, x + g * gap * velocity
        later = (exact(x_m, m, t) - x_m) / gap + (1 - g) ** 2 * c * gap * x_m
        return (exact(x, s, t) - x) / gap + c * gap * x - g * velocity - later, gap * x
    if name == "mean_flow":  # gap (d_s v + grad v . w) = v* - b + (e - 1)(w - b) + c (gap^2 w - gap x)
        return 2 * c * gap * x - slope(s, t) * (velocity - b) - c * gap**2 * velocity, gap * x
    if name == "improved_mean_flow":  # the same with w = b
        return 2 * c * gap * x - (velocity - b) - c * gap**2 * b, gap * x
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
    if not name.startswith(("progressive", "shortcut")):
        raise NotImplementedError(f"by_hand has no branch for {name}: derive its residual and dr/dc, and add one")
    bend = (u - s) ** 2 * c * x  # of X_{s,u}
    second = (slope(u, t) - 1) / (t - u) * bend + c * (t - u) * (exact(x, s, u) + bend)
    return c * gap * x - (1 - g) * c * (u - s) * x - g * second, gap * x


@pytest.mark.parametrize("name", [*SELF_DISTILLED, *CONDITIONAL, *SMALL_STEPS, "flow_matching", "consistency"])
def test_gradient_on_a_wrong_map_pins_the_stop_gradients(name):
    """d(mean r^2)/dc = mean(2 r dr/dc) with the derivative of the student's part alone."""
    whole = name in ("flow_matching", "consistency")  # rows of one kind only
    c, objective = 0.1, made(name, adaptive=0.0, **({} if whole else {"diagonal": 0.0}))
    fm = gaussian_map()
    torch.nn.init.constant_(fm.network.bent, c)
    x1, _ = gaussian_data(fm, 256)
    draws, weight = objective.draw(fm, x1, generator()), 1.0
    if name in SMALL_STEPS:
        objective.target_limit = 0.0
        share = torch.rand(256, generator=generator(1), dtype=torch.float64)
        draws = draws._replace(gamma=share)
        weight = (0.5 if name == "soflow" else 1.0) / share[:, None]
    loss = objective.loss(fm, x1, None, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.bent)
    s, t, g = draws.s[:, None], draws.t[:, None], draws.gamma[:, None]
    g = g if name in ("progressive-uniform", *SMALL_STEPS) else torch.full_like(g, 0.5)
    residual, student = by_hand(name, fm, draws.x0, x1, s, t, g, c)
    torch.testing.assert_close(loss.value.detach(), (weight * residual.square()).mean())
    torch.testing.assert_close(gradient, (weight * 2 * residual * student).mean())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["flow_matching", *CONDITIONAL])
def test_conditional_targets_are_right_in_the_mean(name, case):
    """With the conditional velocity replaced by its expectation given I_s, loss and gradient vanish at the truth."""
    fm, objective = gaussian_map(*case), OBJECTIVES[name]()
    x1, label = gaussian_data(fm, 64)
    draws = objective.draw(fm, x1, generator())
    fm.interpolant = expected(fm, x1, label, draws)
    loss = objective.loss(fm, x1, label, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value < 1e-16 and gradient.abs() < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_consistency_bias_shrinks_with_the_gap(case):
    """At the exact map the mean residual given I_s is the local error of one Euler step: O((u - s)^2) / O(u - s).

    All is affine for Gaussian data, so that the mean over (x0, x1) given I_s is the residual at their means.
    """
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 256)
    bias = []
    for q in (1e2, 2e2, 4e2):
        objective = OBJECTIVES["consistency"](q=q, k=1.0, stage_steps=0, adaptive=0.0)
        x0, s, u, gamma, *_ = objective.draw(fm, x1, generator())
        x = fm.interpolant.point(x0, x1, s)
        m, variance = fm.network.moments(s, label)
        mean = fm.network.mean_of(label)
        a, b = fm.interpolant.alpha(s)[:, None], fm.interpolant.beta(s)[:, None]
        x0_mean = a * fm.base_std**2 / variance * (x - m)
        x1_mean = mean + b * fm.network.std**2 / variance * (x - m)
        given = objective.loss(fm, x1_mean, label, Draws(x0_mean, s, u, gamma))
        bias.append(given.value.item() ** 0.5)
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.03) and bias[1] / bias[2] == pytest.approx(2, rel=0.02)
    if case == CASES[0]:  # its constant: e (u - s)^2 x'' / 2 with x'' / (x - m) the second derivative of the spread
        path = variance.sqrt()
        rate = (1 + fm.network.std**2) / path - ((s[:, None] - 1) + s[:, None] * fm.network.std**2) ** 2 / path**3
        away = 0.5 * (u - s)[:, None] ** 2 * rate / path * (x - m) * fm.network.std / path
        predicted = away / ((1 - s) / s - (1 - u) / u)[:, None]
        assert bias[2] == pytest.approx(predicted.square().mean().sqrt().item(), rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_consistency_distillation_is_right_to_the_order_of_its_step(case):
    """At the exact map and the exact drift all that is left, row by row, is Heun's local error: O(h^3) / O(h)."""
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 256)
    left = []
    for q in (1e2, 2e2, 4e2):
        objective = OBJECTIVES["consistency"](q=q, k=1.0, stage_steps=0, adaptive=0.0)
        left.append(objective(fm, x1, label, generator=generator(), teacher=fm.drift).value.item() ** 0.5)
    assert left[2] < 1e-3
    assert left[0] / left[1] == pytest.approx(4, rel=0.06) and left[1] / left[2] == pytest.approx(4, rel=0.04)


def test_consistency_noise_levels_follow_the_schedule():
    objective, fm = OBJECTIVES["consistency"](q=4.0, stage_steps=100), gaussian_map(base_std=0.5)
    uniform = torch.rand(2, 4000, generator=generator(), dtype=torch.float64)
    for step, stage in ((0, 0), (99, 0), (100, 1), (350, 3)):
        s, u = objective.off_diagonal_times(uniform, fm, step)
        sigma_s, sigma_u = (0.5 * (1 - time) / time for time in (s, u))
        n = 1 + 8 / (1 + sigma_s.exp())
        torch.testing.assert_close(sigma_u, (sigma_s * (1 - n / 4.0 ** (1 + stage))).clamp(min=0), rtol=1e-6, atol=1e-9)
    assert abs(sigma_s.log().mean() + 1.1) < 0.1 and abs(sigma_s.log().std() - 2) < 0.1
    with pytest.raises(UserError, match=r"q=1\.0: must be above 1"):
        OBJECTIVES["consistency"](q=1.0)


def test_shortcut_times_are_dyadic_and_cover_every_step():
    objective = OBJECTIVES["shortcut"](levels=4)
    s, t = objective.off_diagonal_times(
        torch.rand(2, 4000, generator=generator(), dtype=torch.float64), gaussian_map(), 0
    )
    seen = {(float(a), float(b)) for a, b in zip(s, t, strict=True)}
    assert seen == {(j * 2.0**-k, (j + 1) * 2.0**-k) for k in range(4) for j in range(2**k)}
    for k in range(4):
        assert abs((t - s == 2.0**-k).double().mean() - 0.25) < 0.03


def test_finite_difference_converges_with_second_order_and_is_never_in_half_precision():
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
    plain = velocity_difference(fm.float(), x1.float(), s, t)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(velocity_difference(fm, x1.float(), s, t), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", [name for name in SELF_DISTILLED if made(name).uses_teacher])
def test_teacher_replaces_the_live_network_and_gets_no_gradient(name):
    fm, teacher = gaussian_map(wrong=0.1), gaussian_map()
    x1, _ = gaussian_data(fm, 32)
    live = made(name)(fm, x1, generator=generator())
    taught = made(name)(fm, x1, generator=generator(), teacher=teacher.drift)
    assert live.value != taught.value
    taught.value.backward()
    assert teacher.network.wrong.grad is None


@pytest.mark.parametrize("name", [name for name in LIVE if not made(name).uses_teacher])
def test_a_teacher_that_would_be_ignored_is_refused(name):
    with pytest.raises(UserError, match="teacher_ema"):
        made(name, teacher_ema=0.9)
