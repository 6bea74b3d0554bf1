"""Mid-training's regressions on exact trajectories, and LPIPS on weight files of the true format."""

import pytest
import torch
from helpers import CASES, exact_paths, gaussian_data, gaussian_map, generator
from helpers.makers import write_lpips
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from flowmaps import UserError
from flowmaps.metrics.lpips import _unit, lpips
from flowmaps.objectives import OBJECTIVES, MidTraining
from flowmaps.objectives.mid_training import Distance, Target
from samplers import uniform_times

PLAIN = [Distance.l2, Distance.l1, Distance.huber]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distance", PLAIN)
@pytest.mark.parametrize("target", Target)
def test_the_exact_map_on_exact_states_has_no_loss(target, distance, case):
    objective = MidTraining(target=target, distance=distance)
    for wrong in (0.0, 0.1):
        fm = gaussian_map(*case, wrong=wrong)
        loss = objective(fm, exact_paths(fm if not wrong else gaussian_map(*case)), generator=generator()).value
        assert loss > 1e-3 if wrong else loss < 1e-12


@pytest.mark.parametrize("target", Target)
def test_the_loss_of_a_constant_error_by_hand(target):
    """v = exact + c: pairs see c, and the end point sees (1 - s) c."""
    truth, fm, c = gaussian_map(), gaussian_map(wrong=0.1), 0.1
    paths = exact_paths(truth)
    factor = torch.ones(5).double() if target is Target.pairs else 1 - uniform_times(5)[:-1]
    expected = {
        Distance.l2: (factor * c).square().mean(),
        Distance.l1: (factor * c).mean(),
        Distance.huber: ((factor * c).square() + 0.25).sqrt().mean() - 0.5,
    }
    for distance, value in expected.items():
        loss = MidTraining(target=target, distance=distance, huber=0.5)(fm, paths, generator=generator()).value
        torch.testing.assert_close(loss.detach(), value)
    (gradient,) = torch.autograd.grad(
        MidTraining(target=target)(fm, paths, generator=generator()).value, fm.network.wrong
    )
    torch.testing.assert_close(gradient, 2 * c * factor.square().mean())


@pytest.mark.parametrize("target", Target)
def test_every_state_starts_one_row_and_is_carried_along_its_own_path(target):
    fm, steps, paths = gaussian_map(classes=True), 5, 400
    walk = exact_paths(fm, paths, steps)
    x1, label, draws = MidTraining(target=target).prepare(fm, walk, None, generator())
    starts, ends = (draws.s * steps).round().long(), (draws.t * steps).round().long()
    path = torch.arange(paths).repeat_interleave(steps)
    assert torch.equal(starts, torch.arange(steps).repeat(paths)) and torch.equal(label, walk.label[path])
    assert torch.equal(draws.x_s, walk.states[starts, path]) and torch.equal(x1, walk.states[ends, path])
    if target is Target.endpoint:
        assert bool((ends == steps).all())
    else:
        for start in range(steps):
            share = torch.bincount(ends[starts == start], minlength=steps + 1).double() / paths
            later = torch.arange(steps + 1) > start
            assert bool((share[~later] == 0).all())
            assert (share[later] - 1 / (steps - start)).abs().max() < 0.1
    again = MidTraining(target=target).prepare(fm, walk, None, generator())
    assert torch.equal(x1, again[0]) and torch.equal(draws.t, again[2].t)


def test_kind_follows_the_target():
    assert MidTraining().kind == "map" and MidTraining(target=Target.endpoint).kind == "consistency"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"distance": Distance.lpips}, "target=endpoint"),
        ({"huber": -1.0}, "huber"),
        ({"lpips_weights": "folder"}, "distance=lpips"),
    ],
)
def test_options_that_would_break_or_be_ignored_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        MidTraining(**options)


def test_data_and_trajectories_are_not_mixed_up():
    fm = gaussian_map()
    x1, _ = gaussian_data(fm, 8)
    with pytest.raises(UserError, match="not from data"):
        MidTraining()(fm, x1, generator=generator())
    with pytest.raises(UserError, match="not from a Trajectory"):
        OBJECTIVES["lagrangian"]()(fm, exact_paths(fm), generator=generator())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of the two files as they are released, with random weights."""
    return write_lpips(tmp_path_factory.mktemp("lpips"))


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_equals_its_definition(weights, channels):
    """Features after each stage's last ReLU, of unit length, their squared differences weighted and averaged."""
    distance, (x, y) = lpips(str(weights)), torch.rand(2, 3, channels, 32, 32) * 2 - 1
    features = make_layers(cfgs["D"])
    stored = torch.load(weights / "vgg16-397923af.pth")
    features.load_state_dict({k.removeprefix("features."): v for k, v in stored.items() if "features." in k})
    linear = torch.load(weights / "weights-vgg16-lpips.pth")
    scaled = [
        (image.expand(-1, 3, -1, -1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        for image in (x, y)
    ]
    expected, stage = torch.zeros(3), 0
    for number, layer in enumerate(features):
        scaled = [layer(image) for image in scaled]
        if number in (3, 8, 15, 22, 29):
            a, b = (F.normalize(image, dim=1) for image in scaled)
            expected = expected + ((a - b) ** 2 * linear[f"lin{stage}.model.1.weight"]).sum(1).mean(dim=(1, 2))
            stage += 1
    torch.testing.assert_close(distance(x, y), expected.detach(), rtol=1e-4, atol=1e-6)
    assert distance(x, x).abs().max() == 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(x, y).sum(), x)
    assert gradient.abs().max() > 0


def test_lpips_weights_that_are_missing_or_wrong_are_refused_by_name(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"lpips_weights: .*vgg16-397923af.pth is missing and cannot be downloaded.*fetch https"
    ):
        lpips()
    with pytest.raises(UserError, match=r"vgg16-397923af.pth is missing: fetch https"):
        lpips(str(tmp_path))
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"not weights")
    (tmp_path / "weights-vgg16-lpips.pth").write_bytes((weights / "weights-vgg16-lpips.pth").read_bytes())
    with pytest.raises(UserError, match="not LPIPS weights") as error:
        lpips(str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="16 pixels"):
        lpips(str(weights))(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_the_gradient_of_lpips_is_finite_where_no_feature_is_active():
    features = torch.zeros(1, 4, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(_unit(features.relu()).sum(), features)
    assert (gradient == 0).all()
