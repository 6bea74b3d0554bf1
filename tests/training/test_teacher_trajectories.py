"""Trajectories for mid-training: times, solving, files, and the runs that train on them."""

import json
import shutil

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map, run_script
from helpers.runs import assert_same, weights
from safetensors.torch import load_file

from configs.digits import get_config
from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.data import TrajectoryFiles
from flowmaps.objectives.mid_training import Distance, Target
from training.config import Grid, Solver, Start, Trajectories
from training.loop import train
from training.teacher_trajectories import TrajectorySolver, trajectory_times
from training.trainer import Trainer


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (Trajectories(steps=4), [0, 0.25, 0.5, 0.75, 1]),
        (Trajectories(steps=4, low=0.2), [0.2, 0.4, 0.6, 0.8, 1]),
        (Trajectories(steps=2, grid=Grid.given, times=(0, 0.3, 1)), [0, 0.3, 1]),
        (Trajectories(steps=3, grid=Grid.log_snr, low=0.2, high=0.8), [0.2, 0.5, 0.8, 1]),
    ],
)
def test_trajectory_times(options, times):
    torch.testing.assert_close(trajectory_times(options), torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Trajectories(steps=0), "steps"),
        (Trajectories(low=1.0), "low"),
        (Trajectories(grid=Grid.log_snr), "log_snr"),
        (Trajectories(grid=Grid.given), "times"),
        (Trajectories(times=(0, 1)), "grid=given"),
        (Trajectories(steps=2, grid=Grid.given, times=(0, 0.5, 0.4)), "increas"),
        (Trajectories(steps=2, grid=Grid.given, times=(0, 0.5, 0.9)), "end at 1"),
        (Trajectories(start=Start.data), "start=data"),
    ],
)
def test_contradictory_times_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        trajectory_times(options)


@pytest.mark.parametrize("case", CASES)
def test_trajectories_start_from_noise_or_from_noised_data(case):
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 6)
    x0, t = torch.randn(6, 3, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    a, b = fm.interpolant.alpha(t)[:, None], fm.interpolant.beta(t)[:, None]
    for choice, first in ((Start.noise, a * x0), (Start.data, a * x0 + b * x1)):
        made = TrajectorySolver(fm, Trajectories(low=0.3, steps=40, start=choice))(x0, x1, label)
        torch.testing.assert_close(made.states[0], first)
        end = first + (1 - t)[:, None] * fm.network(first, t, torch.ones_like(t), label)
        assert (made.states[-1] - end).abs().max() < 2e-3


def test_dpm_solver_requires_the_linear_interpolant():
    with pytest.raises(UserError, match="linear interpolant"):
        TrajectorySolver(gaussian_map("trigonometric"), Trajectories(solver=Solver.dpm_solver))


def write(teacher, out, *more):
    arguments = [f"--teacher={teacher}", f"--out={out}", "--num=40", "--steps=4", "--shard=16", "--batch=8", *more]
    return run_script("scripts/prepare_data.py", "trajectories", *arguments)


@pytest.fixture(scope="module")
def files(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("walks") / "set"
    assert write(start, out).returncode == 0
    return out


def test_files_hold_the_trajectories_and_a_stopped_command_resumes(start, files, tmp_path):
    stored, teacher = TrajectoryFiles.open(files), FlowMap.from_pretrained(start)
    states, label = stored.fetch(torch.tensor([0, 17, 39]))
    assert len(stored) == 40 and label.tolist() == [0, 7, 9] and stored.shape == (1, 8, 8)
    noise = teacher.noise(40, 0)[[0, 17, 39]]
    made = TrajectorySolver(teacher, Trajectories(steps=4))(noise, None, label)
    torch.testing.assert_close(states.transpose(0, 1), made.states, rtol=1e-4, atol=1e-5)
    shutil.copytree(files, half := tmp_path / "half")
    (half / "shard-00001.safetensors").unlink()
    (half / "checksums.json").unlink()
    before = (half / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="not a complete set"):
        TrajectoryFiles.open(half)
    assert write(start, half).returncode == 0
    assert (half / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert_same(load_file(half / "shard-00001.safetensors"), load_file(files / "shard-00001.safetensors"))
    assert TrajectoryFiles.open(half).digest() == stored.digest()
    other = write(start, half, "--seed=1")
    assert other.returncode == 2 and "another seed" in other.stderr and other.stderr.count("\n") == 1
    (half / "shard-00001.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing or damaged"):
        TrajectoryFiles.open(half)


def test_files_of_trajectories_that_start_from_data(start, tmp_path):
    assert write(start, tmp_path / "w", "--start=data", "--low=0.1", "--data=digits").returncode == 0
    stored = TrajectoryFiles.open(tmp_path / "w")
    states, _ = stored.fetch(torch.arange(40))
    noise = FlowMap.from_pretrained(start).noise(40, 0)
    data = (states[:, 0] - 0.9 * noise) / 0.1
    assert data.min() > -1.001 and data.max() < 1.001 and stored.times[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["trajectories", "--out=x"], "--teacher: missing"),
        (["trajectories", "--teacher=nowhere", "--out=x"], "nowhere"),
        (["trajectories", "--teacher=x", "--out=y", "--solver=rk4"], "euler, heun, dpm_solver"),
        (["trajectories", "--teacher=x", "--out=y", "--start=data"], "--low"),
        (["trajectories", "--teacher=x", "--out=y", "--grid=given", "--times=0,b"], "--times=0,b"),
        (["walks"], "trajectories"),
        ([], "trajectories"),
    ],
)
def test_mistakes_are_one_line(flags, reason):
    done = run_script("scripts/prepare_data.py", *flags)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def middle(start):
    config = get_config("mid_training,smoke")
    config.init_from = config.teacher = str(start)
    config.trajectories.steps, config.steps, config.checkpoint_every, config.sample_every = 4, 6, 3, 6
    return config


@pytest.mark.parametrize("stored", [False, True])
def test_mid_training_lowers_its_loss_and_resumes_exactly(start, files, tmp_path, stored):
    config = middle(start)
    config.trajectories.files = str(files) if stored else ""
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")
    fm = train(config, tmp_path / "parts")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert fm.info.kind == "map" and fm.info.images_seen == 6 * 16
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert all(loss > 0 for loss in losses)


def test_micro_steps_do_not_change_the_trajectories(start):
    """Micro-batches hold complete trajectories with separate noise: two of 8 rows differ from one of 16 in noise."""
    config = middle(start)
    config.accumulate = 2
    trainer = Trainer.build(config)
    trainer.micro_step_loss(0, 0)
    (x1, label, draws), _ = trainer.latest
    assert len(x1) == len(label) == len(draws.s) == 8
    config.accumulate = 8
    with pytest.raises(UserError, match="batch=16: a micro-step of 2 rows does not divide into trajectories of 4 rows"):
        Trainer.build(config)


LPIPS = {"target": Target.endpoint, "distance": Distance.lpips, "lpips_weights": "nowhere"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, root: setattr(c, "teacher", ""), r"teacher: .*needs a teacher.*teacher=DIR"),
        (lambda c, root: setattr(c, "teacher", "nowhere"), "nowhere"),
        (lambda c, root: setattr(c, "teacher", str(root / "points")), "samples of shape"),
        (lambda c, root: setattr(c, "teacher", str(root / "classes")), "num_classes 3"),
        (lambda c, root: setattr(c.trajectories, "files", "nowhere"), "nowhere: no such directory"),
        (lambda c, root: vars(c.objective).update(LPIPS), "lpips_weights=nowhere: .*vgg16-397923af.pth is missing"),
        (lambda c, root: setattr(c.trajectories, "low", 2.0), r"trajectories\.low=2\.0"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(start, tmp_path, change, reason):
    from flowmaps.networks import MLP, UNet

    FlowMap(MLP(), "linear", 0.5, FlowMapInfo((2,))).save_pretrained(tmp_path / "points")
    network = UNet(8, 1, 8, (1,), 1, (), num_classes=3)
    FlowMap(network, "linear", 0.5, FlowMapInfo((1, 8, 8), 3)).save_pretrained(tmp_path / "classes")
    config = middle(start)
    change(config, tmp_path)
    with pytest.raises(UserError, match=reason) as error:
        Trainer.build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c.trajectories, "solver", Solver.euler), "made with solver=heun"),
        (lambda c: setattr(c.data, "flip", True), "cannot be applied"),
        (lambda c: (setattr(c, "teacher", ""), setattr(c, "base_std", 1.0), setattr(c, "init_from", "")), "base_std"),
    ],
)
def test_files_that_do_not_fit_are_refused(start, files, change, reason):
    config = middle(start)
    config.trajectories.files = str(files)
    change(config)
    with pytest.raises(UserError, match=reason):
        Trainer.build(config)
