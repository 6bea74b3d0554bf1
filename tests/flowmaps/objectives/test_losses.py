"""Properties that all objectives share: draws, weights, dropout, the split of the batch, compilation."""

import dataclasses
import itertools

import pytest
import torch
from benchmarks.objectives import Unsplit
from helpers import gaussian_data, gaussian_map, generator
from helpers.objectives import ANCHORED, LIVE, MAPS, PLAIN, SMALL_STEPS
from helpers.small_networks import IMAGES, small

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.derivatives import velocity_jvp
from flowmaps.networks import MLP, UNet
from flowmaps.networks.layers import Dropout
from flowmaps.objectives import OBJECTIVES, Draws, LogVariance, TrajectoryObjective, eulerian, facm, lagrangian
from flowmaps.objectives.time_sampling import Times
from samplers import Trajectory, uniform_times

# Every objective on the smallest graph, relatives of others as slow tests; the hardest derivatives on others too.
COMPILED = [
    pytest.param("DiT", name, {}, marks=() if name == "lagrangian" else pytest.mark.slow) for name in OBJECTIVES
] + [pytest.param("DiT", "mean_flow", {"guidance_max": 3.0}, marks=pytest.mark.slow)]
COMPILED += [
    pytest.param("UNet adm", name, {"guidance_max": 3.0, "guidance_interval": True}, marks=pytest.mark.slow)
    for name in ("improved_mean_flow", "lagrangian")
]
TOLD = {"guidance_max": 3.0, "guidance_interval": True}
COMPILED += [pytest.param("IMFDiT second_head", "improved_mean_flow", TOLD, marks=pytest.mark.slow)]
COMPILED += [
    pytest.param(*pair, {}, marks=pytest.mark.slow)
    for pair in itertools.product(IMAGES, ("lagrangian", "eulerian"))
    if pair[0] != "DiT"
]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("name", LIVE)
def test_draws_are_keyed_by_the_generator(name):
    """And uniform, where the objective does not have its own times."""
    fm, objective = gaussian_map(), OBJECTIVES[name]()
    x1, _ = gaussian_data(fm, 4000)
    x0, s, t, gamma, *_ = objective.draw(fm, x1, generator(5))
    rows = objective.diagonal_rows(4000)
    assert torch.equal(s[:rows], t[:rows]) and bool((s[rows:] <= t[rows:]).all())
    assert abs(x0.std() - fm.base_std) < 0.03
    assert name in SMALL_STEPS or abs(gamma.mean() - 0.5) < 0.03
    uniform = getattr(objective, "times", Times.triangle) is Times.triangle
    assert not rows or not uniform or abs(s[:rows].mean() - 0.5) < 0.03
    if 0 < rows < 4000 and uniform and name != "shortcut":  # min and max of two uniforms
        assert abs(s[rows:].mean() - 1 / 3) < 0.04 and abs(t[rows:].mean() - 2 / 3) < 0.04
    again = objective.draw(fm, x1, generator(5))
    assert all(torch.equal(a, b) for a, b in zip((x0, s, t, gamma), again[:4], strict=True))


def test_loss_is_the_joint_mean_of_the_paper_share():
    fm = gaussian_map(wrong=0.3)
    x1, _ = gaussian_data(fm, 40)
    loss = OBJECTIVES["lagrangian"]()(fm, x1, generator=generator())
    expected = 0.75 * loss.terms["diagonal"] + 0.25 * loss.terms["off_diagonal"]
    torch.testing.assert_close(loss.value.detach(), expected)


def test_soflow_shares_the_dropout_mask_of_its_jumps():
    """With a step of size 0 both jumps are the same function of the same point, if the mask is the same."""
    torch.manual_seed(0)
    network = UNet(8, 1, 8, (1,), 1, (), dropout=0.5).train()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    fm, objective, x1 = FlowMap(network), OBJECTIVES["soflow"](diagonal=0.0), torch.randn(8, 1, 8, 8)
    draws = objective.draw(fm, x1, generator())
    at_once = objective.row_losses(fm, x1, None, draws._replace(gamma=torch.zeros(8)), None, {})
    assert bool((at_once == 0).all())
    assert objective.loss(fm, x1, None, draws).value != objective.loss(fm, x1, None, draws).value  # a fresh mask
    assert all(m.mask is None and not m.shared for m in network.modules() if isinstance(m, Dropout))


@pytest.mark.parametrize("name", [name for name in ANCHORED if name != "soflow"])
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


@pytest.mark.parametrize("name", LIVE)
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


def test_logarithmic_weight_is_an_adaptive_one_whose_constant_is_learned():
    """ln(exp(-w) r^2 + c) + w row by row: gradients dr^2 / (r^2 + c exp(w)), and c exp(w) / (r^2 + c exp(w)) of w."""
    fm, c = gaussian_map(wrong=0.3), 0.01
    x1, _ = gaussian_data(fm, 64)
    objective, weight = OBJECTIVES["mean_flow"](), LogVariance(limit=20.0, log_floor=c)
    draws = objective.draw(fm, x1, generator())
    torch.nn.init.normal_(weight.linear.weight, std=0.3)
    assert weight(draws.s, draws.t).std() > 0.1

    def gradients(loss):
        parameters = [fm.network.wrong, fm.network.bent, weight.linear.weight, weight.linear.bias]
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    loss = objective.loss(fm, x1, None, draws, weight=weight)
    w, rows = weight(draws.s, draws.t), objective.row_losses(fm, x1, None, draws, None, {})
    torch.testing.assert_close(loss.value, (torch.log(torch.exp(-w) * rows + c) + w).mean())
    floor = (c * torch.exp(w)).detach()
    total = rows.detach() + floor
    by_hand = gradients((rows / total).mean()), gradients((w * floor / total).mean())
    torch.testing.assert_close(gradients(loss.value), (*by_hand[0][:2], *by_hand[1][2:]))


def test_pseudo_huber_consistency_has_the_gradient_of_its_norm():
    """sqrt(|d|^2 + c^2) / (sigma_s - sigma_u) of the difference d of student and target, times 2 / dimension."""
    c, objective, fm = 0.3, OBJECTIVES["consistency"](huber=0.3), gaussian_map()
    torch.nn.init.constant_(fm.network.bent, 0.1)
    x1, _ = gaussian_data(fm, 64)
    draws = objective.draw(fm, x1, generator())
    sigma_s, sigma_u = ((1 - time) / time for time in (draws.s, draws.t))
    difference = objective.residual(fm, x1, None, draws, None) * (sigma_s - sigma_u)[:, None]
    assert (difference.norm(dim=1) < c).any() and (difference.norm(dim=1) > c).any()
    norm = (difference.square().sum(dim=1) + c**2).sqrt() / (sigma_s - sigma_u)
    loss = objective.loss(fm, x1, None, draws)
    torch.testing.assert_close(loss.value, norm.mean() / 3)
    ours, theirs = (torch.autograd.grad(value, fm.network.bent)[0] for value in (loss.value, norm.mean()))
    torch.testing.assert_close(ours, 2 / 3 * theirs)
    plain = OBJECTIVES["consistency"]().loss(fm, x1, None, draws).terms
    torch.testing.assert_close(loss.terms, plain)  # the residual itself is logged
    with pytest.raises(UserError, match=r"huber=0\.06: needs adaptive=0\.5"):
        OBJECTIVES["consistency"](huber=0.06, adaptive=0.0)


@pytest.mark.parametrize("name", [*PLAIN, "mean_flow", "improved_mean_flow"])
def test_adaptive_weight_divides_by_a_constant_power(name):
    """One row per batch: the loss is r^2 / (3 r^2 + c)^p and its gradient that of r^2 over the same constant.

    MeanFlow's is r^2 / (r^2 + c / 3)^p.
    """
    fm, c = gaussian_map(wrong=0.3), 0.01 if name == "improved_mean_flow" else 1e-3
    x1, _ = gaussian_data(fm, 1)
    plain, weighted = (OBJECTIVES[name](adaptive=p)(fm, x1, generator=generator()) for p in (0.0, 0.75))
    constant = (3 * plain.value.detach() + c) ** 0.75 / (3**0.75 if "mean_flow" in name else 1)
    torch.testing.assert_close(weighted.value, plain.value / constant)
    gradients = [torch.autograd.grad(loss.value, fm.network.wrong)[0] for loss in (plain, weighted)]
    torch.testing.assert_close(gradients[1], gradients[0] / constant)
    with pytest.raises(UserError, match="adaptive"):
        OBJECTIVES[name](adaptive=-1.0)


@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("name", SMALL_STEPS)
def test_weights_of_small_steps(name, p):
    """Rows of the plain square e, by share a: SoFlow's on q = r / a, alpha-Flow's a / (e + c) for p = 1."""
    objective = OBJECTIVES[name](adaptive=p)
    c, e = 0.01 if name == "soflow" else 1e-3, torch.tensor([0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    s, a = torch.zeros_like(e), torch.tensor([0.5, 0.5, 0.1, 0.02], dtype=torch.float64)
    draws = Draws(s, s, torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64), a)
    diagonal = e[:2] / (e[:2] + c) ** p
    q, a = e[2:] / a[2:] ** 2, a[2:]
    expected = a ** (2 * p - 1) * e[2:] / (e[2:] + c) ** p if name == "alpha_flow" else 0.5 * a * q / (q + c) ** p
    torch.testing.assert_close(objective.adapted(e, draws, 7), torch.cat([diagonal, expected]))
    if name == "alpha_flow":  # where the derivative has replaced the step
        torch.testing.assert_close(objective.adapted(e, draws._replace(gamma=None), 7), e / (e + c) ** p)


@pytest.mark.parametrize(("network", "name", "options"), COMPILED)
def test_compiled_loss_equals_eager(network, name, options):
    """fullgraph: no graph break, the derivative included."""
    network, _, head = network.partition(" second_head")
    fm, objective = small(network, **({"second_head": True} if head else {})), OBJECTIVES[name](**options)
    x1, label = torch.randn(8, *fm.info.shape), torch.arange(8) % 3 if fm.info.num_classes else None
    batch = x1
    if issubclass(OBJECTIVES[name], TrajectoryObjective):  # two paths of four steps: eight rows
        batch = Trajectory(uniform_times(4), torch.randn(5, 2, *fm.info.shape), None if label is None else label[:2])
    x1, label, draws = objective.prepare(fm, batch, label, generator())

    def gradient(loss):
        return torch.autograd.grad(loss(fm, x1, label, draws).value, list(fm.parameters()), allow_unused=True)

    torch.compiler.reset()  # each objective compiles the same code anew, and torch limits how often
    compiled = torch.compile(objective.loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(compiled), gradient(objective.loss), strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_alpha_flow_compiles_before_and_after_the_derivative_replaces_the_step():
    fm, objective = small("DiT"), OBJECTIVES["alpha_flow"](alpha_steps=10)
    x1, label = torch.randn(8, *fm.info.shape), torch.arange(8) % 3
    torch.compiler.reset()
    compiled = torch.compile(objective.loss, fullgraph=True, backend="aot_eager")
    for step in (4, 5, 10):
        draws = objective.draw(fm, x1, generator(), step)
        assert (draws.gamma is None) == (step == 10)
        values = [loss(fm, x1, label, draws).value for loss in (compiled, objective.loss)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["UNet", "EDM2UNet", "DiT"])
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


@pytest.mark.parametrize("name", LIVE)
def test_diagonal_rows_never_enter_a_derivative(name, monkeypatch):
    seen = []

    def spy(fm, x, s, t, *rest, **moving):
        seen.append((s, t))
        return velocity_jvp(fm, x, s, t, *rest, **moving)

    for module in (lagrangian, eulerian, facm):
        monkeypatch.setattr(module, "velocity_jvp", spy)
    fm, x1 = small("UNet"), torch.randn(16, 1, 8, 8)
    terms = OBJECTIVES[name]()(fm, x1, torch.arange(16) % 4, generator=generator()).terms
    assert ("jvp_norm" in terms) == bool(seen)
    rows = 16 - OBJECTIVES[name]().diagonal_rows(16)
    assert all(len(s) == rows and bool((s < t).all()) for s, t in seen)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lagrangian", {"guidance": float("inf")}),
        ("lagrangian", {"time_mean": (2.0, 2.0)}),
        ("mean_flow", {"times": Times.gap, "time_mean": (float("nan"), 0.0)}),
        ("consistency", {"k": -5.0}),
        ("soflow", {"alpha_start": 0.0}),
        ("soflow", {"alpha_start": 0.1, "alpha_end": 0.2}),
        ("soflow", {"alpha_steps": -1}),
        ("alpha_flow", {"ramp": (0.5, 0.5)}),
        ("alpha_flow", {"target_limit": -1.0}),
        ("facm", {"teacher_ema": 0.9}),
        ("facm", {"sigma_std": 0.0}),
        ("consistency", {"sigma_mean": float("nan")}),
    ],
)
def test_options_that_would_break_or_be_ignored_are_refused(name, options):
    with pytest.raises(UserError) as error:
        OBJECTIVES[name](**options)
    assert error.value.field in options


def test_consistency_is_exact_under_autocast():
    """The residual divides a small difference: half precision would be noise."""
    fm, objective, x1 = small("UNet"), OBJECTIVES["consistency"](q=4096.0), torch.randn(8, 1, 8, 8)
    draws = objective.draw(fm, x1, generator())
    plain = objective.loss(fm, x1, None, draws).value
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.loss(fm, x1, None, draws).value == plain


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_validated_when_replaced_and_have_no_options_without_effect(name):
    """They are mutable, as sections of a config: a changed one is validated by ``replace``."""
    objective = OBJECTIVES[name]()
    if name in MAPS:
        objective.diagonal = 1.5
        with pytest.raises(UserError, match=r"diagonal=1\.5"):
            dataclasses.replace(objective)
        with pytest.raises(UserError, match="diagonal"):
            OBJECTIVES[name](diagonal=1.5)
    else:
        with pytest.raises(AttributeError):
            objective.diagonal = 0.5
        with pytest.raises(TypeError):
            OBJECTIVES[name](diagonal=0.5)
    assert dataclasses.replace(OBJECTIVES[name]()) == OBJECTIVES[name]()
    assert all(f.init for f in dataclasses.fields(objective))
