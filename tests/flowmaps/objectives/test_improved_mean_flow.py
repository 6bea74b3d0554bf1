"""Improved MeanFlow with a second head: gradients by hand, the exact Gaussian map, and the form without the head."""

import pytest
import torch
from helpers import generator
from helpers.guided import DRAWN, Guided
from helpers.small_networks import small
from torch import nn
from torch.autograd import forward_ad

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.networks.conditioning import split_label
from flowmaps.objectives import OBJECTIVES

CONFIG = {"second_head": True}


class Toy(nn.Module):
    """v = (a + c (t - s)) x, and a second head e w (1 + t - s) x with e of the label and w its guidance weight."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG
        self.a, self.c = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.7, -0.4))
        self.e = nn.Parameter(torch.tensor([0.9, 0.5], dtype=torch.float64))  # of class 0, and of "no label"

    def forward(self, x, s, t, label=None):
        return (self.a + self.c * (t - s))[:, None] * x

    def second(self, x, s, t, label=None):
        given = split_label(label, s, 1, guidance=True, interval=True)
        return ((given.rows @ self.e) * given.guidance * (1 + t - s))[:, None] * x

    def pair(self, x, s, t, label=None):
        return self(x, s, t, label), self.second(x, s, t, label)


def test_gradient_of_each_head_by_hand():
    """Loss of a row: |V - g|^2 / (sg |V - g|^2 + 0.01), and so for the second head; constants have no gradient."""
    toy, n = Toy(), 64
    fm = FlowMap(toy, info=FlowMapInfo(shape=(2,), num_classes=1))
    x1 = torch.randn(n, 2, dtype=torch.float64, generator=generator(1))
    label = (torch.arange(n) < 5).long()  # the first, diagonal rows have none
    objective = OBJECTIVES["improved_mean_flow"](diagonal=0.5, adaptive=1.0, **DRAWN)
    draws = objective.draw(fm, x1, generator())
    loss = objective.loss(fm, x1, label, draws)
    gradients = torch.autograd.grad(loss.value, [toy.a, toy.c, toy.e])

    a, c, (e, none) = toy.a.detach(), toy.c.detach(), toy.e.detach()
    s, t, (told, low, high) = draws.s[:, None], draws.t[:, None], draws.told.T[..., None]
    x, b, gap = (1 - s) * draws.x0 + s * x1, x1 - draws.x0, t - s
    w = torch.where((low <= s) & (s <= high), told, 1.0)
    dropped = (label == 1)[:, None]
    q = e * w * x
    g = torch.where(dropped, b, b + (1 - 1 / w) * (q - none * x))
    along = (a + c * gap) * q - c * x  # of s at rate 1 and x along q
    compound = (a + c * gap) * x - gap * along
    own = torch.where(dropped, none, e)  # told the weight as drawn, not the one that applies at s
    second = own * told * (1 + gap) * x
    squares = [(y - g).square().sum(dim=1, keepdim=True) for y in (compound, second)]
    expected = torch.stack([square / (square + 0.01) for square in squares]).sum(dim=0).mean()
    torch.testing.assert_close(loss.value.detach(), expected)

    def slope(y, square, dy):  # of the mean over rows
        return (2 * (y - g) * dy / (square + 0.01)).sum(dim=1).mean()

    by_e = told * (1 + gap) * x
    hand = [
        slope(compound, squares[0], x),
        slope(compound, squares[0], gap * x),
        torch.stack([slope(second, squares[1], by_e * ~dropped), slope(second, squares[1], by_e * dropped)]),
    ]
    for ours, theirs in zip(gradients, hand, strict=True):
        torch.testing.assert_close(ours, theirs)
    means = [square / 2 for square in squares]
    for name, rows in (("diagonal", slice(0, 32)), ("off_diagonal", slice(32, None))):
        torch.testing.assert_close(loss.terms[name], means[0][rows].mean())
        torch.testing.assert_close(loss.terms[f"second_{name}"], means[1][rows].mean())


class TwoHeads(Guided):
    """The exact guided map of Gaussian data, and its drift by a second head with another error."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG
        self.astray = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def second(self, x, s, t, label=None):
        return Guided.forward(self, x, s, s, label) - self.wrong + self.astray

    def pair(self, x, s, t, label=None):
        return self(x, s, t, label), self.second(x, s, t, label)


def test_the_mean_gradient_of_both_heads_vanishes_at_the_exact_map():
    """Each row has a partner of the same I_s whose dI_s/ds lies as far on the other side of the drift."""
    network = TwoHeads()
    fm = FlowMap(network, info=FlowMapInfo(shape=(3,), num_classes=2))
    x1, label = torch.randn(64, 3, dtype=torch.float64, generator=generator(2)), torch.arange(64) % 3
    objective = OBJECTIVES["improved_mean_flow"](diagonal=0.25, adaptive=1.0, **DRAWN)
    draws, parameters = objective.draw(fm, x1, generator()), [network.wrong, network.bent, network.astray]
    s = draws.s[:, None]
    x_s = (1 - s) * draws.x0 + s * x1
    with torch.no_grad():
        other = 2 * fm.drift(x_s, draws.s, label) - (x1 - draws.x0)
    found = []
    for data, drawn in ((x1, draws), (x_s + (1 - s) * other, draws._replace(x0=x_s - s * other))):
        found.append(torch.stack(torch.autograd.grad(objective.loss(fm, data, label, drawn).value, parameters)))
    assert (found[0].abs() > 1e-4).all()
    torch.testing.assert_close(found[1], -found[0], rtol=1e-7, atol=1e-9)


def test_with_v_on_the_diagonal_as_second_head_it_is_the_form_without_at_weight_one():
    fm = small("IMFDiT", second_head=True).double()
    plain = FlowMap(fm.network.for_sampling(), base_std=fm.base_std, info=fm.info)
    network = fm.network
    network.second = lambda x, s, t, label: network(x, s, s, label)
    network.pair = lambda x, s, t, label: (network(x, s, t, label), network.second(x, s, t, label))
    x1, label = torch.randn(16, *fm.info.shape, dtype=torch.float64, generator=generator()), torch.arange(16) % 4
    told, today = (OBJECTIVES["improved_mean_flow"](adaptive=1.0, **options) for options in (DRAWN, {}))
    draws = told.draw(fm, x1, generator())
    neutral = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).expand(16, 3)
    ours = told.row_losses(fm, x1, label, draws._replace(guidance=draws.s**0, told=neutral), None, {})
    theirs = today.row_losses(plain, x1, label, draws._replace(guidance=None, told=None), None, {})
    torch.testing.assert_close(ours[0], theirs, rtol=1e-12, atol=0)
    for head in ("head.1.weight", "head_blocks.0.mlp.w1.weight"):
        gradients = [
            torch.autograd.grad(losses.sum(), model.network.get_parameter(head), retain_graph=True)[0]
            for model, losses in ((fm, ours[0]), (plain, theirs))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_gradients_of_both_heads_are_the_same(autocast):
    fm, gradients = small("IMFDiT", second_head=True), []
    x1, label = torch.randn(8, *fm.info.shape, generator=generator()), torch.arange(8) % 5
    objective = OBJECTIVES["improved_mean_flow"](diagonal=0.5, adaptive=1.0, **DRAWN)
    draws = objective.draw(fm, x1, generator())
    for checkpointing in (False, True):
        if checkpointing:
            fm.network.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective.loss(fm, x1, label, draws).value
        gradients.append(torch.autograd.grad(loss, list(fm.parameters())))  # none is unused
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_blocks_of_the_second_head_carry_no_tangent(monkeypatch):
    """Their derivative is not used; a tangent would double their cost."""
    fm, moving = small("IMFDiT", second_head=True), {}
    for name, block in fm.network.named_modules():
        if name.endswith("norm1"):
            block.register_forward_hook(
                lambda block, inputs, y, name=name: moving.update({name: forward_ad.unpack_dual(y).tangent is not None})
            )
    x1, label = torch.randn(4, *fm.info.shape, generator=generator()), torch.arange(4)
    OBJECTIVES["improved_mean_flow"](diagonal=0.0, **DRAWN)(fm, x1, label, generator=generator())
    assert moving == {name: not name.startswith("second") for name in moving} and len(moving) == 5


def test_near_data_the_velocity_of_the_path_is_that_of_the_network_of_pixels():
    objective, fm = OBJECTIVES["improved_mean_flow"](end_floor=0.05), FlowMap(Toy())
    x0, x1 = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator())
    s = torch.tensor([0.2, 0.95, 0.97], dtype=torch.float64)
    x = fm.interpolant.point(x0, x1, s)
    expected = (x1 - x) / (1 - s).clamp(min=0.05)[:, None]
    torch.testing.assert_close(objective.path_velocity(fm, x0, x1, s), expected)
    torch.testing.assert_close(expected[:2], (x1 - x0)[:2])
    with pytest.raises(UserError, match=r"end_floor=0\.05: is for the linear path only"):
        objective.path_velocity(FlowMap(Toy(), "trigonometric"), x0, x1, s)
    with pytest.raises(UserError, match=r"end_floor=1\.5: must be in"):
        OBJECTIVES["improved_mean_flow"](end_floor=1.5)
