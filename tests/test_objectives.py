"""Every objective of the table against the closed-form Gaussian map, in float64."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.networks import MLP, UNet
from flowmaps.objectives import OBJECTIVES, LogVariance
from samplers.callables import expand

SELF_DISTILLED = [name for name, cls in OBJECTIVES.items() if cls.kind == "map"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_residual_and_gradient_vanish_at_the_exact_map(name, case):
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 64)
    loss = OBJECTIVES[name](diagonal=0.0)(fm, x1, label, generator=generator())
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    assert loss.value < 1e-16 and gradient.abs() < 1e-8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_residual_and_gradient_are_positive_off_it(name, case):
    fm = gaussian_map(*case, wrong=0.1)
    x1, label = gaussian_data(fm, 64)
    loss = OBJECTIVES[name](diagonal=0.0)(fm, x1, label, generator=generator())
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


def test_lagrangian_gradient_pins_the_stop_gradients():
    """On v = exact + c the residual is d_t X + c - sg(b + c)(sg X): its gradient in c comes from the student alone.

    With m(t) = v' coefficient: X_wrong = X + (t - s) c, d_t X_wrong = b(X) + c and the target is
    b(X + (t - s) c) + c = b(X) + A (t - s) c + c, so r = -A_t (t - s) c with A_t the slope of the drift, while
    dr/dc (student only) = 1. Hence d(mean r^2)/dc = mean(2 r) = -2 c mean(A_t (t - s)).
    """
    c = 0.1
    fm = gaussian_map(wrong=c)
    x1, _ = gaussian_data(fm, 256)
    objective = OBJECTIVES["lagrangian"](diagonal=0.0)
    draws = objective.draw(fm, x1, generator())
    loss = objective.loss(fm, x1, None, draws)
    (gradient,) = torch.autograd.grad(loss.value, fm.network.wrong)
    t = draws.t[:, None]
    var = (1 - t) ** 2 + t**2 * fm.network.std**2
    slope = (-(1 - t) + t * fm.network.std**2) / var  # A_t
    residual = -slope * expand(draws.t - draws.s, x1) * c
    torch.testing.assert_close(loss.value.detach(), residual.square().mean())
    torch.testing.assert_close(gradient, 2 * residual.mean())


@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_teacher_replaces_the_live_network_and_gets_no_gradient(name):
    fm, teacher = gaussian_map(wrong=0.1), gaussian_map()
    x1, _ = gaussian_data(fm, 32)
    live = OBJECTIVES[name]()(fm, x1, generator=generator())
    taught = OBJECTIVES[name]()(fm, x1, generator=generator(), teacher=teacher.drift)
    assert live.value != taught.value
    taught.value.backward()
    assert teacher.network.wrong.grad is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_are_uniform_and_keyed_by_the_generator(name):
    fm, objective = gaussian_map(), OBJECTIVES[name]()
    x1, _ = gaussian_data(fm, 4000)
    x0, s, t = objective.draw(fm, x1, generator(5))
    rows = objective.diagonal_rows(4000)
    assert torch.equal(s[:rows], t[:rows]) and bool((s[rows:] < t[rows:]).all())
    assert abs(s[:rows].mean() - 0.5) < 0.03 and abs(x0.std() - fm.base_std) < 0.03
    if rows < 4000:  # min and max of two uniforms
        assert abs(s[rows:].mean() - 1 / 3) < 0.04 and abs(t[rows:].mean() - 2 / 3) < 0.04
    again = objective.draw(fm, x1, generator(5))
    assert all(torch.equal(a, b) for a, b in zip((x0, s, t), again, strict=True))


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
    if name in SELF_DISTILLED:
        with pytest.raises(UserError, match="diagonal"):
            OBJECTIVES[name](diagonal=1.5)
