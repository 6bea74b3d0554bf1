"""Every objective of the table against the closed-form Gaussian map, in float64."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.derivatives import velocity_difference, velocity_jvp
from flowmaps.networks import MLP, DiT, UNet
from flowmaps.networks.layers import Dropout, soft_label, with_guidance, without_label
from flowmaps.objectives import OBJECTIVES, Draws, LogVariance, eulerian, lagrangian
from flowmaps.objectives.eulerian import Stop
from flowmaps.objectives.lagrangian import Derivative
from flowmaps.objectives.progressive import Middle
from flowmaps.objectives.times import Times
from training.costs import Unsplit

MAPS = [name for name, cls in OBJECTIVES.items() if cls.kind == "map"]
ANCHORED = [name for name, cls in OBJECTIVES.items() if cls().diagonal]  # with rows that regress the drift
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
    bend = (u - s) ** 2 * c * x  # of X_{s,u}
    second = (slope(u, t) - 1) / (t - u) * bend + c * (t - u) * (exact(x, s, u) + bend)
    return c * gap * x - (1 - g) * c * (u - s) * x - g * second, gap * x


@pytest.mark.parametrize("name", [*SELF_DISTILLED, *CONDITIONAL, "flow_matching", "consistency"])
def test_gradient_on_a_wrong_map_pins_the_stop_gradients(name):
    """d(mean r^2)/dc = mean(2 r dr/dc) with the derivative of the student's part alone."""
    whole = name in ("flow_matching", "consistency")  # rows of one kind only
    c, objective = 0.1, made(name, adaptive=0.0, **({} if whole else {"diagonal": 0.0}))
    fm = gaussian_map()
    torch.nn.init.constant_(fm.network.bent, c)
    x1, _ = gaussian_data(fm, 256)
    draws = objective.draw(fm, x1, generator())
    loss = objective.loss(fm, x1, None, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.bent)
    s, t, g = draws.s[:, None], draws.t[:, None], draws.fraction[:, None]
    g = g if name == "progressive-uniform" else torch.full_like(g, 0.5)
    residual, student = by_hand(name, fm, draws.x0, x1, s, t, g, c)
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
        x0, s, u, fraction, _ = objective.draw(fm, x1, generator())
        x = fm.interpolant.point(x0, x1, s)
        m, variance = fm.network.moments(s, label)
        mean = fm.network.mean if label is None else fm.network.mean[label]
        a, b = fm.interpolant.alpha(s)[:, None], fm.interpolant.beta(s)[:, None]
        x0_mean = a * fm.base_std**2 / variance * (x - m)
        x1_mean = mean + b * fm.network.std**2 / variance * (x - m)
        given = objective.loss(fm, x1_mean, label, Draws(x0_mean, s, u, fraction))
        bias.append(given.value.item() ** 0.5)
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.03) and bias[1] / bias[2] == pytest.approx(2, rel=0.02)
    if case == CASES[0]:  # its constant: e (u - s)^2 x'' / 2 with x'' / (x - m) the second derivative of the spread
        path = variance.sqrt()
        rate = (1 + fm.network.std**2) / path - ((s[:, None] - 1) + s[:, None] * fm.network.std**2) ** 2 / path**3
        away = 0.5 * (u - s)[:, None] ** 2 * rate / path * (x - m) * fm.network.std / path
        predicted = away / ((1 - s) / s - (1 - u) / u)[:, None]
        assert bias[2] == pytest.approx(predicted.square().mean().sqrt().item(), rel=0.02)


def test_consistency_noise_levels_follow_the_schedule():
    objective, fm = OBJECTIVES["consistency"](q=4.0, stage_steps=100), gaussian_map(base_std=0.5)
    uniform = torch.rand(2, 4000, generator=generator(), dtype=torch.float64)
    for step, stage in ((0, 0), (99, 0), (100, 1), (350, 3)):
        s, u = objective.off_diagonal_times(uniform, fm, step)
        sigma_s, sigma_u = (0.5 * (1 - time) / time for time in (s, u))
        n = 1 + 8 / (1 + sigma_s.exp())
        torch.testing.assert_close(sigma_u, (sigma_s * (1 - n / 4.0 ** (1 + stage))).clamp(min=0), rtol=1e-6, atol=1e-9)
    assert abs(sigma_s.log().mean() + 1.1) < 0.1 and abs(sigma_s.log().std() - 2) < 0.1
    with pytest.raises(UserError, match="q must be above 1"):
        OBJECTIVES["consistency"](q=1.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_consistency_shares_the_dropout_mask(compiled):
    """With u = s student and target are the same function of the same point, if the mask is the same."""
    torch.manual_seed(0)
    network = UNet(8, 1, 8, (1,), 1, (), dropout=0.5).train()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    fm, objective, x1 = FlowMap(network), OBJECTIVES["consistency"](adaptive=0.0), torch.randn(8, 1, 8, 8)
    draws = objective.draw(fm, x1, generator())
    loss = torch.compile(objective.loss, fullgraph=True, backend="aot_eager") if compiled else objective.loss
    assert loss(fm, x1, None, draws._replace(t=draws.s)).value == 0
    assert loss(fm, x1, None, draws).value != loss(fm, x1, None, draws).value  # a fresh mask each time
    assert all(m.mask is None and not m.shared for m in network.modules() if isinstance(m, Dropout))


@pytest.mark.parametrize("times", [Times.logit_normal, Times.gap])
def test_times_have_the_stated_logits(times):
    """logit_normal: two of them, in order. gap: that of t, and that of (t - s) / t."""
    mean, std = ((0.4, 0.4) if times is Times.logit_normal else (0.4, -0.8)), (1.0, 1.0)
    objective = OBJECTIVES["mean_flow"](times=times, time_mean=mean, time_std=std, diagonal=0.5)
    x1 = torch.zeros(40_000, 1, dtype=torch.float64)
    _, s, t, *_ = objective.draw(FlowMap(MLP(1)), x1, generator())
    assert bool((s[20_000:] < t[20_000:]).all()) and torch.equal(s[:20_000], t[:20_000])
    seen = {"diagonal": torch.logit(s[:20_000])}
    s, t = s[20_000:], t[20_000:]
    if times is Times.gap:
        seen |= {"end": torch.logit(t), "share": torch.logit((t - s) / t)}
    else:
        seen["both"] = torch.logit(torch.cat([s, t]))
    for name, logit in seen.items():
        assert abs(logit.mean() - (mean[1] if name == "share" else mean[0])) < 0.03, name
        assert abs(logit.std() - 1) < 0.03, name
    with pytest.raises(UserError, match="time_std"):
        OBJECTIVES["mean_flow"](time_std=(1.0, 0.0))


def test_shortcut_times_are_dyadic_and_cover_every_step():
    objective = OBJECTIVES["shortcut"](levels=4)
    s, t = objective.off_diagonal_times(
        torch.rand(2, 4000, generator=generator(), dtype=torch.float64), gaussian_map(), 0
    )
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


@pytest.mark.parametrize("name", [name for name in SELF_DISTILLED if made(name).taught])
def test_teacher_replaces_the_live_network_and_gets_no_gradient(name):
    fm, teacher = gaussian_map(wrong=0.1), gaussian_map()
    x1, _ = gaussian_data(fm, 32)
    live = made(name)(fm, x1, generator=generator())
    taught = made(name)(fm, x1, generator=generator(), teacher=teacher.drift)
    assert live.value != taught.value
    taught.value.backward()
    assert teacher.network.wrong.grad is None


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not made(name).taught])
def test_a_teacher_that_would_be_ignored_is_refused(name):
    with pytest.raises(UserError, match="teacher_ema"):
        made(name, teacher_ema=0.9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_are_uniform_and_keyed_by_the_generator(name):
    fm, objective = gaussian_map(), OBJECTIVES[name]()
    x1, _ = gaussian_data(fm, 4000)
    x0, s, t, fraction, _ = objective.draw(fm, x1, generator(5))
    rows = objective.diagonal_rows(4000)
    assert torch.equal(s[:rows], t[:rows]) and bool((s[rows:] < t[rows:]).all())
    assert abs(x0.std() - fm.base_std) < 0.03 and abs(fraction.mean() - 0.5) < 0.03
    assert not rows or abs(s[:rows].mean() - 0.5) < 0.03
    if 0 < rows < 4000 and name != "shortcut":  # min and max of two uniforms
        assert abs(s[rows:].mean() - 1 / 3) < 0.04 and abs(t[rows:].mean() - 2 / 3) < 0.04
    again = objective.draw(fm, x1, generator(5))
    assert all(torch.equal(a, b) for a, b in zip((x0, s, t, fraction), again[:4], strict=True))


def test_loss_is_the_joint_mean_of_the_paper_share():
    fm = gaussian_map(wrong=0.3)
    x1, _ = gaussian_data(fm, 40)
    loss = OBJECTIVES["lagrangian"]()(fm, x1, generator=generator())
    expected = 0.75 * loss.terms["diagonal"] + 0.25 * loss.terms["off_diagonal"]
    torch.testing.assert_close(loss.value.detach(), expected)


@pytest.mark.parametrize("name", ANCHORED)
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
    assert plain.terms == {name: weighted.terms[name] for name in plain.terms}
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


def small(network):
    """A network for 8 x 8 images with every weight random."""
    torch.manual_seed(0)
    made = {
        "unet": lambda: UNet(8, 1, 8, (1,), 1, (8,), num_classes=3, guidance=True),
        "dit": lambda: DiT(8, 1, patch=4, width=16, depth=1, heads=2, num_classes=3, guidance=True),
    }[network]()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return FlowMap(made.train(), info=FlowMapInfo(shape=(1, 8, 8), num_classes=3))


COMPILED = [("dit", name, {}) for name in OBJECTIVES]  # the smaller graph
COMPILED += [("unet", "lagrangian", {}), ("unet", "eulerian", {}), ("dit", "mean_flow", {"guidance_max": 3.0})]


@pytest.mark.parametrize(("network", "name", "options"), COMPILED)
def test_compiled_loss_equals_eager(network, name, options):
    """fullgraph: no graph break, the derivative included."""
    fm, objective = small(network), OBJECTIVES[name](**options)
    x1, label = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    draws = objective.draw(fm, x1, generator())

    def gradient(loss):
        return torch.autograd.grad(loss(fm, x1, label, draws).value, list(fm.parameters()), allow_unused=True)

    torch.compiler.reset()  # each objective compiles the same code anew, and torch limits how often
    compiled = torch.compile(objective.loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(compiled), gradient(objective.loss), strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_rows_without_a_gap_need_no_derivative(network):
    """Splitting the batch has the gradient of one jvp over all rows, the diagonal ones times t - s = 0."""
    fm, x1, label = small(network), torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    objective, parameters = OBJECTIVES["lagrangian"](), list(fm.parameters())
    draws, gradients = objective.draw(fm, x1, generator()), []
    for each in (objective, Unsplit()):
        loss = each.loss(fm, x1, label, draws).value
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-6 * max(1.0, b.norm())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_diagonal_rows_never_enter_a_derivative(name, monkeypatch):
    seen = []

    def spy(fm, x, s, t, *rest, **moving):
        seen.append((s, t))
        return velocity_jvp(fm, x, s, t, *rest, **moving)

    for module in (lagrangian, eulerian):
        monkeypatch.setattr(module, "velocity_jvp", spy)
    fm, x1 = small("unet"), torch.randn(16, 1, 8, 8)
    terms = OBJECTIVES[name]()(fm, x1, torch.arange(16) % 4, generator=generator()).terms
    assert ("jvp_norm" in terms) == bool(seen)
    assert all(len(s) == 4 and bool((s < t).all()) for s, t in seen)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_frozen_and_refuse_a_bad_share(name):
    objective = OBJECTIVES[name]()
    with pytest.raises(FrozenInstanceError):
        objective.diagonal = 0.5
    if name in MAPS:
        with pytest.raises(UserError, match="diagonal"):
            OBJECTIVES[name](diagonal=1.5)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "consistency"])
def test_guidance_moves_the_target_to_the_guided_drift(name, drawn):
    """Class 1 stands for "no label": with dI_s/ds replaced by its mean given I_s and the label, the network's own drift
    is right where it equals w b(x; label) + (1 - w) b(x; no label), and not where it is b(x; label)."""
    options = {"guidance_max": 3.0} if drawn else {"guidance": 3.0}
    objective, exact = OBJECTIVES[name](**options), gaussian_map("linear", 0.5, classes=True)
    exact.info = FlowMapInfo(shape=(3,), num_classes=1)
    x1, _ = gaussian_data(exact, 64)
    label = (torch.arange(64) % 4 == 3).long()
    draws = objective.draw(exact, x1, generator())
    w = draws.guidance
    assert bool((w == 3).all()) != drawn and bool(((w >= 1) & (w <= 3)).all())
    x_s = exact.interpolant.point(draws.x0, x1, draws.s)
    none = torch.ones_like(label)
    b, u = exact.drift(x_s, draws.s, label), exact.drift(x_s, draws.s, none)
    w = torch.where(label == 1, 1.0, w)
    target, seen = objective.guide(exact, x_s, draws.s, label, b, draws.guidance)
    torch.testing.assert_close(target, w[:, None] * b + (1 - w[:, None]) * u)
    assert torch.equal(seen, with_guidance(label, w, 1) if drawn else label)
    with pytest.raises(UserError, match="labels"):
        objective(exact, x1, None, generator=generator())


def test_guidance_keeps_augmentation_and_refuses_nonsense():
    rows = soft_label(torch.tensor([0, 2]), torch.tensor([[0.5], [0.7]]), 2)
    unlabelled, has = without_label(rows, 2)
    torch.testing.assert_close(unlabelled, torch.tensor([[0, 0, 1, 0.5], [0, 0, 1, 0.7]]))
    assert has.tolist() == [True, False]
    assert with_guidance(rows, torch.tensor([2.0, 1.0]), 2)[:, 4].tolist() == [2, 1]
    for options in ({"guidance": 0.5}, {"guidance": 2.0, "guidance_max": 2.0}):
        with pytest.raises(UserError, match="guidance"):
            OBJECTIVES["lagrangian"](**options)


def test_network_takes_a_guidance_weight_and_one_is_neutral():
    torch.manual_seed(0)
    network = UNet(8, 1, 16, (1,), 1, (), num_classes=3, augment_dim=2, guidance=True)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    plain, rows = network(x, t, t, label), soft_label(label, torch.zeros(4, 2), 3)
    torch.testing.assert_close(network(x, t, t, with_guidance(rows, torch.ones(4), 3)), plain)
    assert (network(x, t, t, with_guidance(rows, torch.full((4,), 2.0), 3)) - plain).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="guidance=True"):
        network(x, t, t, label[:, None].float())
    with pytest.raises(ValueError, match="num_classes is 0"):
        UNet(8, 1, 16, (1,), 1, (), guidance=True)
