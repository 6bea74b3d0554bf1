"""Augmentation: closed forms, exactness of what is left alone, and the network being told."""

import math

import pytest
import torch

from flowmaps import UserError
from flowmaps.data.augment import PARAMETERS, _moved, _rotation, drop_labels, edm_augment, random_hflip
from flowmaps.networks import UNet
from flowmaps.networks.conditioning import soft_label
from training.trainer import Trainer


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n=4, size=32):
    """Smooth pictures with values in [-1, 1]."""
    coarse = torch.randn(n, 3, 4, 4, generator=stream()).clamp(-1, 1)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def test_mirror_half():
    x = smooth(400, 4)
    y, _ = random_hflip(x, None, stream())
    turned = (y == x.flip(-1)).flatten(1).all(dim=1)
    assert ((y == x).flatten(1).all(dim=1) ^ turned).all() and 150 < turned.sum() < 250


def test_probability_zero_only_mirrors_and_reports_it():
    x = smooth(50, 8)
    y, parameters = edm_augment(x, 0.0, stream())
    assert parameters.shape == (50, PARAMETERS) and not parameters[:, 1:].any()
    flipped = parameters[:, 0].bool()
    assert flipped.any() and not flipped.all()
    assert torch.equal(y[flipped], x[flipped].flip(-1)) and torch.equal(y[~flipped], x[~flipped])


def test_each_transform_has_its_probability_and_untouched_images_are_exact():
    """Of 8000 images with probability p: p / 2 upside down, p each for the other four, independent of each other."""
    x, p = torch.zeros(8000, 1, 2, 2), 0.12
    _, parameters = edm_augment(x, p, stream())
    on = parameters != 0
    shares = [on[:, 1], on[:, 2], on[:, 4], on[:, 5], on[:, 7]]
    for share, expected in zip(shares, [p / 2, p, p, p, p], strict=True):
        assert share.float().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / 8000))
    assert on[:, 7].equal(on[:, 8])  # both directions shift together
    untouched = ~on[:, 2:].any(dim=1)
    assert untouched.float().mean().item() == pytest.approx((1 - p) ** 4, abs=0.02)
    x = smooth(200, 8)
    y, parameters = edm_augment(x, p, stream(1))
    still = ~parameters.any(dim=1)
    assert still.any() and torch.equal(y[still], x[still]) and y.abs().max() <= 1


def test_a_quarter_turn_and_whole_pixel_shifts_are_exact():
    x = smooth(2)
    everything, identity = torch.tensor([True, True]), torch.eye(2).expand(2, 2, 2)
    quarter = _moved(x, _rotation(torch.full((2,), math.pi / 2)), torch.zeros(2, 2), everything)
    torch.testing.assert_close(quarter, torch.rot90(x, -1, (2, 3)), atol=1e-4, rtol=0)
    shift = torch.tensor([[2 * 3 / 32, -2 * 5 / 32]]).expand(2, 2)  # right by 3 pixels, up by 5
    moved = _moved(x, identity, shift, everything)
    torch.testing.assert_close(moved[..., :-5, 3:], x[..., 5:, :-3], atol=1e-4, rtol=0)


def transform(parameters, sign):
    """EDM's matrix (appendix F.2, table 6) for points (right, down, 1) of an image that spans [-1, 1]^2.

    scale2d(2^(a2 / 5), 2^(a2 / 5)), then rotate2d(-a3), then rotate2d(a4), scale2d(2^(a5 / 5), 2^(-a5 / 5)) and
    rotate2d(-a4), then a translation by (a6, a7) eighths of the image. Told are a2, (cos a3 - 1, sin a3),
    a5 (cos a4, sin a4), a6 and a7. The ``sign`` of a5 is not told: (a5, a4) and (-a5, a4 + pi) look the same.
    """

    def scale(x, y):
        return torch.diag(torch.tensor([x, y, 1.0]))

    def rotate(angle):
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])

    a2, cosine, sine, x, y, a6, a7 = parameters[2:].tolist()
    a3, a4, a5 = math.atan2(sine, cosine + 1), math.atan2(y, x), sign * math.hypot(x, y)
    shift = torch.tensor([[1, 0, a6 / 4], [0, 1, a7 / 4], [0, 0, 1.0]])
    stretch = rotate(-a4) @ scale(2 ** (a5 / 5), 2 ** (-a5 / 5)) @ rotate(a4)  # the first to act is on the right
    return shift @ stretch @ rotate(-a3) @ scale(2 ** (a2 / 5), 2 ** (a2 / 5))


def test_images_are_moved_as_the_parameters_say(monkeypatch):
    """The matrix that a told parameter stands for is the one that is applied, with every draw and each alone."""
    seen = []
    monkeypatch.setattr("flowmaps.data.augment._moved", lambda x, *matrix: seen.append(matrix) or x)
    for probability in (1.0, 0.12):
        _, parameters = edm_augment(torch.zeros(200, 1, 4, 4), probability, stream())
        linear, shift, _ = seen.pop()
        made = torch.cat([linear, shift[:, :, None]], dim=2)
        both = [torch.stack([transform(p, sign)[:2] for p in parameters]) - made for sign in (1, -1)]
        off = torch.stack(both).abs().amax(dim=(2, 3))
        assert off.min(dim=0).values.max() < 1e-5
        assert 0.3 < (off[0] < off[1])[parameters[:, 5] != 0].float().mean() < 0.7


@pytest.mark.parametrize("probability", [1.0, 0.12])
def test_a_picture_known_everywhere_lands_where_the_parameters_say(probability):
    """A picture is a function of the place: each pixel shows the place that it came from, to a hundredth."""
    size = 64
    ticks = (torch.arange(size) + 0.5) / size * 2 - 1
    right, down = ticks.expand(size, size), ticks[:, None].expand(size, size)

    def picture(right, down):
        return 0.4 * torch.sin(3 * right + 1) + 0.4 * torch.cos(2 * down - right)

    made, parameters = edm_augment(picture(right, down).expand(32, 1, size, size), probability, stream(3))
    places = torch.stack([right, down, torch.ones(size, size)]).flatten(1)
    for image, p in zip(made, parameters, strict=True):
        off = []
        for sign in (1, -1):
            x, y, _ = transform(p, sign).inverse() @ places
            inside = (x.abs() < 0.95) & (y.abs() < 0.95)
            expected = picture(x * (1 - 2 * p[0]), y * (1 - 2 * p[1]))
            off.append((image.flatten() - expected)[inside].abs().max())
        assert min(off) < 0.01


def test_scale_enlarges():
    x = torch.full((1, 1, 32, 32), -1.0)
    x[..., 12:20, 12:20] = 1.0
    grown = _moved(x, 2 * torch.eye(2)[None], torch.zeros(1, 2), torch.tensor([True]))
    assert (grown > 0).sum() == 4 * (x > 0).sum()


@pytest.mark.parametrize("classes", [0, 3])
def test_network_is_conditioned_on_parameters_and_zeros_mean_none(classes):
    torch.manual_seed(0)
    network = UNet(8, 1, 16, (1,), 1, (), num_classes=classes, augment_dim=PARAMETERS)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = smooth(4, 8)[:, :1], torch.rand(4, generator=stream())
    label = torch.tensor([0, 1, 2, 3]) if classes else None  # 3: no label
    plain = network(x, t, t, label)
    zeros, told = torch.zeros(4, PARAMETERS), torch.randn(4, PARAMETERS, generator=stream(2))
    torch.testing.assert_close(network(x, t, t, soft_label(label, zeros, classes)), plain)
    assert (network(x, t, t, soft_label(label, told, classes)) - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    if classes:
        none = soft_label(None, zeros, classes)
        torch.testing.assert_close(network(x, t, t, none), network(x, t, t, None))
    with pytest.raises(ValueError, match="augment_dim=0"):
        UNet(8, 1, 16, (1,), 1, ())(x, t, t, told)


def test_training_augments_and_a_resume_repeats_the_draws_of_each_step():
    from configs.digits import get_config

    def trainer(**data):
        config = get_config("lagrangian,smoke")
        config.network.augment_dim = PARAMETERS if "augment" in data else 0
        for name, value in data.items():
            setattr(config.data, name, value)
        return Trainer.build(config)

    augmenting = trainer(augment=0.5)
    first = augmenting.step(0)["loss"]
    weight = augmenting.module.fm.network.embedding.augmentation.weight
    before = weight.clone()
    augmenting.step(1)
    augmenting.step(2)
    assert not torch.equal(weight, before)
    assert torch.equal(trainer(augment=0.5).step(0)["loss"], first)
    assert not torch.equal(trainer().step(0)["loss"], trainer(flip=True).step(0)["loss"])


def test_augmentation_that_does_not_fit_is_refused():
    from configs.checkerboard import get_config as points
    from configs.digits import get_config

    config = get_config("lagrangian,smoke")
    config.data.augment = 0.1
    with pytest.raises(UserError, match=r"^data\.augment=0\.1: .*network\.augment_dim=9"):
        Trainer.build(config)
    config.data.augment, config.network.augment_dim = 0.0, 9
    with pytest.raises(UserError, match=r"^data\.augment=0: .*network\.augment_dim=0"):
        Trainer.build(config)
    config.init_from = "nowhere"  # weights may know more than the run uses
    with pytest.raises(UserError, match="no directory nowhere"):
        Trainer.build(config)
    config = points("lagrangian,smoke")
    config.data.flip = True
    with pytest.raises(UserError, match=r"^data\.flip: "):
        Trainer.build(config)


@pytest.mark.parametrize("first", [1000, 250, 100])
def test_labels_are_left_out_of_the_first_rows_at_the_share_of_all(first):
    label = torch.zeros(1000, dtype=torch.int64)
    counts = []
    for seed in range(200):
        dropped = drop_labels(label, torch.full_like(label, 7), 0.1, first, torch.Generator().manual_seed(seed)) == 7
        assert not dropped[first:].any()
        counts.append(int(dropped.sum()))
    assert abs(sum(counts) / 200 - 100) < 3
