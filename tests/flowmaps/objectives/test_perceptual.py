"""Perceptual terms: the crop, the gradient by hand with toy features, the rows that have none."""

import math

import pytest
import torch
from helpers import generator
from helpers.small_networks import small
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.objectives import OBJECTIVES, perceptual

ON = {"lpips": 0.4, "convnext": 0.1, "convnext_weights": "given", "perceptual_after": 0.3}
improved_mean_flow = OBJECTIVES["improved_mean_flow"]


def by_torchvision(image, crop, size):
    cubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    made = [resized_crop(one, *map(int, box), [size, size], **cubic) for one, box in zip(image, crop, strict=True)]
    return torch.stack(made)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_resizing_is_that_of_torchvision(size):
    """Smaller, and larger, with edges."""
    crop = perceptual.crops(torch.rand(4, 32, generator=generator()), 20, 16)
    crop[0] = torch.tensor([0, 0, 20, 16])
    image = torch.randn(32, 3, 20, 16, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(perceptual.resized(image, crop, size), by_torchvision(image, crop, size))
    square = image[..., :16, :]
    torch.testing.assert_close(perceptual.resized(square, perceptual.whole(square), 16), square)


def test_the_law_of_crops():
    n, side = 20_000, 1000
    uniform = torch.rand(4, n, generator=generator(), dtype=torch.float64)
    uniform[:, :4] = torch.tensor([[0, 0, 1 - 2**-53, 1 - 2**-53]]).double()
    top, left, height, width = perceptual.crops(uniform, side, side).T
    assert (torch.stack([top, left, height, width]) % 1 == 0).all()
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    inside = (height < side) & (width < side)
    area, aspect = (height * width / side**2)[inside], (width / height)[inside].log() / math.log(4 / 3)
    assert 0.078 < area.min() and abs(aspect).max() < 1.01
    few = uniform[0][inside] < 0.5  # none of these is cut
    torch.testing.assert_close(area[few], 0.08 + 0.92 * uniform[0][inside][few], rtol=0, atol=2e-3)
    torch.testing.assert_close(aspect[few], 2 * uniform[1][inside][few] - 1, rtol=0, atol=2e-2)
    assert abs((left / (side - width))[inside].mean() - 0.5) < 0.01


class Toy(nn.Module):
    """v = (a + c (t - s)) x, and a second head e x."""

    def __init__(self):
        super().__init__()
        self.config = {"second_head": True}
        self.a, self.c, self.e = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, -0.4, 0.9))

    def forward(self, x, s, t, label=None):
        return (self.a + self.c * (t - s))[:, None, None, None] * x

    def second(self, x, s, t, label=None):
        return self.e * x

    def pair(self, x, s, t, label=None):
        return self(x, s, t, label), self.second(x, s, t, label)


@pytest.fixture
def toy_features(monkeypatch):
    """Two squared distances of linear features in place of the networks."""

    def distance(filters):
        return lambda y, x: (filters * (y - x)).square().flatten(1).mean(dim=1)

    torch.manual_seed(3)
    filters = {"lpips": torch.randn(1, 224, 224).double(), "convnext": torch.randn(1, 224, 224).double()}
    for name, given in filters.items():
        monkeypatch.setattr(perceptual, name, lambda weights, device, given=given: distance(given))
    return filters


def test_gradient_by_hand(toy_features):
    """0.4 P / (sg P + 0.01) + 0.1 Q / (sg Q + 0.01) next to the loss without, for rows with s above 0.3."""
    toy, n = Toy(), 24
    fm = FlowMap(toy, info=FlowMapInfo(shape=(1, 8, 8)))
    x1 = torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=generator(1))
    with_terms, without = (improved_mean_flow(diagonal=0.5, adaptive=1.0, **options) for options in (ON, {}))
    draws = with_terms.draw(fm, x1, generator())
    plain = without.draw(fm, x1, generator())
    assert plain.crop is None and all(torch.equal(a, b) for a, b in zip(plain[:4], draws[:4], strict=True))
    parameters, found, terms = [toy.a, toy.c, toy.e], [], {}
    for objective in (with_terms, without):
        loss = objective.loss(fm, x1, None, draws)
        found.append((loss.value.detach(), torch.stack(torch.autograd.grad(loss.value, parameters))))
        terms = terms or loss.terms
    value, gradient = (a - b for a, b in zip(*found, strict=True))

    s, t = draws.s[:, None, None, None], draws.t[:, None, None, None]
    x, counted = (1 - s) * draws.x0 + s * x1, draws.s > 0.3
    assert 0 < counted.sum() < n and counted[:12].any() and counted[12:].any()
    y = x + (1 - s) * (toy.a + toy.c * (t - s)).detach() * x
    moves = [(1 - s) * x, (1 - s) * (t - s) * x]  # of y with a and c
    expected, by_hand = 0.0, torch.zeros(3, dtype=torch.float64)
    for name, weight in (("lpips", 0.4), ("convnext", 0.1)):
        seen = [toy_features[name] * by_torchvision(image, draws.crop, 224) for image in (y - x1, *moves)]
        distance = seen[0].square().flatten(1).mean(dim=1)
        scale = weight * counted / (distance + 0.01)
        expected += (scale * distance).mean()
        for i, move in enumerate(seen[1:]):
            by_hand[i] += (scale * 2 * (seen[0] * move).flatten(1).mean(dim=1)).mean()
        torch.testing.assert_close(terms[name], (distance * counted).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-9)


def test_rows_near_noise_have_neither_term(toy_features):
    fm, x1 = FlowMap(Toy()), torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator(1))
    objective = improved_mean_flow(**ON)
    draws = objective.draw(fm, x1, generator())
    draws = draws._replace(s=torch.tensor([0.0, 0.1, 0.3, 0.31, 0.5, 0.99], dtype=torch.float64))
    velocity = torch.randn(x1.shape, dtype=torch.float64, generator=generator(2)).requires_grad_()
    velocity.data[0] = math.inf  # not even through a factor of 0
    losses = objective.perceptual_losses(fm, x1, draws, velocity, {})
    (gradient,) = torch.autograd.grad(losses.sum(), velocity)
    assert (losses[:, :3] == 0).all() and (losses[:, 3:] > 0).all()
    assert (gradient[:3] == 0).all() and (gradient[3:].flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lpips": -1.0}, "lpips=-1.0: must not be negative"),
        ({"lpips_weights": "folder"}, "lpips_weights=folder: has no effect without lpips above 0"),
        ({"convnext": 0.1}, "convnext=0.1: needs convnext_weights"),
        ({"perceptual_after": 1.0}, r"perceptual_after=1.0: must be in \[0, 1\)"),
    ],
)
def test_options_that_would_break_or_be_ignored_are_refused(options, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        improved_mean_flow(**options)


def test_samples_and_networks_that_do_not_fit_are_refused(toy_features):
    objective = improved_mean_flow(lpips=0.4)
    for shape in ((2,), (4, 8, 8)):
        with pytest.raises(UserError, match=r"^lpips=0\.4: compares images of 1 or 3 channels"):
            objective.check_samples(shape, torch.device("cpu"))
    fm = small("IMFDiT")
    x1 = torch.randn(4, *fm.info.shape)
    with pytest.raises(UserError, match=r"^lpips=0\.4: needs a network with a second head"):
        objective(fm, x1, generator=generator())
    with pytest.raises(UserError, match=r"^lpips=0\.4: is for the linear path only"):
        objective(FlowMap(Toy(), "trigonometric"), x1.double(), generator=generator())


def test_missing_weights_are_refused_before_training(tmp_path):
    objective = improved_mean_flow(lpips=0.4, lpips_weights=str(tmp_path))
    with pytest.raises(UserError, match=r"^lpips_weights=.*vgg16-397923af.pth is missing: fetch https"):
        objective.check_samples((3, 8, 8), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks for it where a graph ends and the next begins
def test_a_compiled_loss_is_the_eager_one(toy_features):
    fm, found = FlowMap(Toy(), info=FlowMapInfo(shape=(1, 8, 8))), []
    x1 = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=generator(1))
    objective = improved_mean_flow(diagonal=0.5, **ON)
    draws = objective.draw(fm, x1, generator())
    torch.compiler.reset()
    for run in (objective.loss, torch.compile(objective.loss, backend="aot_eager")):
        loss = run(fm, x1, None, draws).value
        found.append(torch.stack([loss.detach(), *torch.autograd.grad(loss, list(fm.parameters()))]))
    torch.testing.assert_close(*found)
