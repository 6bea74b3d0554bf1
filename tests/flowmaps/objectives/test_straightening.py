"""Straightening and reflow: segments, residuals by hand, runs that learn them, and low-rank changes."""

import json
import shutil

import pytest
import torch
from helpers import exact_paths, gaussian_map, generator
from helpers.runs import assert_same, weights

from configs.checkerboard import get_config as checkerboard
from configs.digits import get_config
from flowmaps import FlowMap, UserError
from flowmaps.networks import MLP, DiT, EDM2UNet, UNet
from flowmaps.objectives import Straightening
from flowmaps.objectives.straightening import TrainPoint
from samplers import Schedule, Trajectory, euler, heun, uniform_times
from training.config import Trajectories
from training.loop import train
from training.lora import add_lora, merge_lora
from training.trainer import Trainer

BENT = Schedule({2: (0, 0.75, 1), 3: (0, 0.25, 0.75, 1)}, sampler="euler")


def stored(folder, schedule):
    (file := folder / "schedule.json").write_text(schedule.to_json())
    return str(file)


def segments(objective, steps=12):
    starts, ends = objective.segments(uniform_times(steps))
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def test_segments_are_those_of_the_grids(tmp_path):
    assert segments(Straightening(), 3) == [(0, 1), (1, 2), (2, 3)]
    assert segments(Straightening(steps=(1, 2))) == [(0, 12), (0, 6), (6, 12)]
    file = stored(tmp_path, BENT)
    assert segments(Straightening(schedule=file, steps=(2,))) == [(0, 9), (9, 12)]
    both = Straightening(schedule=file)
    assert segments(both) == [(0, 9), (9, 12), (0, 3), (3, 9), (9, 12)] and both.rows(uniform_times(12)) == 5
    assert both.schedules == {"euler": BENT} and both.kind == "drift" and not Straightening(steps=(2,)).schedules


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("state", TrainPoint)
def test_the_loss_and_its_gradient_by_hand(state, classes):
    """A constant error c of the drift: the loss is the mean of |b + c - mean velocity|^2 over paths and segments."""
    truth, fm, c = gaussian_map(classes=classes), gaussian_map(classes=classes, wrong=0.1), 0.1
    walk = exact_paths(truth, paths=6, steps=4)
    first, last = walk.states[0], walk.states[-1]
    residuals = []
    for s, e in ((0, 2), (2, 4)):
        x, t = walk.states[s], walk.times[s]
        velocity = (walk.states[e] - x) / (walk.times[e] - t)
        if state is TrainPoint.chord:
            x, velocity = (1 - t) * first + t * last, last - first
        residuals.append(truth.drift(x, t.expand(6), walk.label).detach() + c - velocity)
    residual = torch.stack(residuals)
    loss = Straightening(steps=(2,), state=state)(fm, walk, generator=generator()).value
    torch.testing.assert_close(loss.detach(), residual.square().mean())
    (gradient,) = torch.autograd.grad(loss, fm.network.wrong)
    torch.testing.assert_close(gradient, 2 * residual.mean())


def test_a_drift_that_is_straight_already_has_no_loss():
    """Data N(mean, 0): all paths are straight lines to the mean, at every number of steps and in both states."""
    fm = gaussian_map()
    fm.network.std = fm.network.std * 0
    x0 = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    times = uniform_times(8)
    walk = Trajectory(times, x0 + times.view(-1, 1, 1) * (fm.network.mean - x0))
    for state in TrainPoint:
        loss = Straightening(steps=(1, 2, 8), state=state)(fm, walk, generator=generator()).value
        assert loss < 1e-20


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": (0,)}, "at least 1"),
        ({"steps": (2, 2)}, "different"),
        ({"steps": (4,), "schedule": "FILE"}, "steps=4: schedule=.* has 2, 3"),
        ({"schedule": "nowhere.json"}, "nowhere.json cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, reason):
    file = stored(tmp_path, BENT)
    with pytest.raises(UserError, match=reason):
        Straightening(**{key: file if value == "FILE" else value for key, value in options.items()})


def test_grids_that_the_path_or_the_sampler_do_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match="grid of 3 steps has times that are missing from the trajectory of 4 steps"):
        Straightening(steps=(3,)).segments(uniform_times(4))
    with pytest.raises(UserError, match="for the sampler map, not euler"):
        Straightening(schedule=stored(tmp_path, Schedule({2: (0, 0.5, 1)}, sampler="map")))


def short(start, **options):
    config = get_config("straightening,smoke")
    config.init_from = config.teacher = str(start)
    config.trajectories = Trajectories(steps=8)
    config.steps = config.sample_every = config.checkpoint_every = 4
    for name, value in options.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("lora", [0, 2])
def test_it_resumes_exactly_and_exports_a_drift_with_its_grids(start, tmp_path, lora):
    config = short(start, lora=lora, checkpoint_every=2)
    config.objective.schedule, config.objective.steps = stored(tmp_path, BENT), (2, 3)
    config.batch = 20
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    fm = train(config, tmp_path / "parts")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert fm.info.kind == "drift" and fm.info.schedules == {"euler": BENT}
    fm, before = FlowMap.from_pretrained(tmp_path / "parts"), FlowMap.from_pretrained(start)
    assert fm.network.state_dict().keys() == before.network.state_dict().keys()
    assert fm.fingerprint() != before.fingerprint()
    origin = json.loads((tmp_path / "parts" / "config.json").read_text())["origin"]
    assert len(origin["objective.schedule"]) == 64 and origin["teacher"] == before.fingerprint()
    stored(tmp_path, Schedule({2: (0, 0.5, 1), 3: (0, 0.25, 0.75, 1)}, sampler="euler"))
    with pytest.raises(UserError, match=r"objective\.schedule"):
        train(config, tmp_path / "parts")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A drift whose paths are bent."""
    config = checkerboard("flow_matching,smoke")
    config.steps = config.sample_every = config.checkpoint_every = 400
    config.batch, config.ema = 128, (0.95,)
    train(config, folder := tmp_path_factory.mktemp("board"))
    return folder


@pytest.mark.parametrize("lora", [0, 4])
def test_straightening_brings_two_euler_steps_closer_to_the_path(board, lora):
    config, teacher = checkerboard("straightening,smoke"), FlowMap.from_pretrained(board)
    config.init_from = config.teacher = str(board)
    config.trajectories, config.lora, config.ema = Trajectories(steps=8), lora, (0.9,)
    config.objective.steps, config.optim.lr, config.optim.warmup = (2,), 5e-3, 0
    config.steps, config.batch = 100, 128
    trainer = Trainer.build(config)
    for step in range(config.steps):
        trainer.step(step)
    fm, x = trainer.averaged(config.steps), teacher.noise(256, seed=8)
    with torch.no_grad():
        end = heun(teacher.drift, x, uniform_times(8))
        error, before = ((euler(m.drift, x, uniform_times(2)) - end).square().mean() for m in (fm, teacher))
    assert error < 0.6 * before


@pytest.mark.parametrize(
    "network",
    [
        UNet(8, 1, 8, (1,), 1, (8,), num_classes=3),
        MLP(dim=2, width=16, depth=1),
        DiT(8, 1, patch=2, width=16, depth=1, heads=2, num_classes=3),
    ],
    ids=lambda network: type(network).__name__,
)
def test_low_rank_changes_start_as_nothing_and_merge_to_plain_weights(network):
    network.eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    points = isinstance(network, MLP)
    x, t = torch.randn(2, 2) if points else torch.randn(2, 1, 8, 8), torch.rand(2)
    label = None if points else torch.tensor([0, 2])
    names, before = set(network.state_dict()), network(x, t, t, label)
    add_lora(network, 2)
    torch.testing.assert_close(network(x, t, t, label), before)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for name in trained:
        torch.nn.init.normal_(network.get_parameter(name), std=0.2)
    changed = network(x, t, t, label)
    assert (changed - before).abs().max() > 1e-3
    merge_lora(network)
    torch.testing.assert_close(network(x, t, t, label), changed, rtol=1e-4, atol=1e-4)
    assert set(network.state_dict()) == names


def test_low_rank_needs_layers_and_weights_to_change():
    with pytest.raises(UserError, match="EDM2UNet has no Linear or Conv2d"):
        add_lora(EDM2UNet(8, 1, width=16, channel_mult=(1,), blocks=1, attention_resolutions=(8,)), 2)
    config = get_config("flow_matching,smoke")
    config.lora = 4
    with pytest.raises(UserError, match=r"^lora=4: .*init_from"):
        config.validate()
