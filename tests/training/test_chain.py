"""Three stages by one command: killed, resumed, and what each starts from."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, run_script
from helpers.runs import assert_same, weights
from safetensors.torch import load_file

from configs.digits import get_config
from flowmaps import FlowMap, UserError
from training.chain import placed, run_chain, table
from training.config_rows import Chain
from training.loop import train
from training.trainer import Trainer

STAGES = ("pre_training", "mid_training", "post_training")
FLAGS = ["--config=configs/digits.py:pipeline,smoke", "--config.mid_training.steps=40"]
FLAGS += [f"--config.{stage}.checkpoint_every=5" for stage in STAGES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A chain that was never stopped."""
    folder = tmp_path_factory.mktemp("chain") / "whole"
    done = run_script("scripts/train.py", *FLAGS, f"--workdir={folder}", check=True)
    assert all(f"| {stage} |" in done.stdout for stage in STAGES)
    return folder


@pytest.mark.slow
def test_killed_in_the_second_stage_and_resumed(whole, tmp_path):
    command = [sys.executable, "scripts/train.py", *FLAGS, f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 120
    while not (tmp_path / "mid_training/checkpoints/step-00000005").is_dir():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "post_training").exists() and not (tmp_path / "chain.json").exists()
    run_script("scripts/train.py", *FLAGS, f"--workdir={tmp_path}", check=True)
    assert '"event": "resume"' in (tmp_path / "mid_training/log.jsonl").read_text()
    for stage in STAGES:
        for file in ("network", "ema-0.99", "optimizer"):
            assert_same(weights(tmp_path / stage, file), weights(whole / stage, file))
    assert json.loads((tmp_path / "chain.json").read_text())[2] == json.loads((whole / "chain.json").read_text())[2]


def test_each_stage_starts_from_the_average_of_the_one_before(whole):
    for before, stage in itertools.pairwise(STAGES):
        origin = json.loads((whole / stage / "config.json").read_text())["origin"]
        model = FlowMap.from_pretrained(whole / before)
        assert origin["init_from"] == model.fingerprint()
        assert_same(model.network.state_dict(), weights(whole / before, "ema-0.99"))
        assert (origin["teacher"] == origin["init_from"]) == (stage == "mid_training")
    records = json.loads((whole / "chain.json").read_text())
    assert [row["init_from"] for row in records[1:]] == [row["model"] for row in records[:-1]]
    assert "| post_training | lagrangian | 20 | 320 |" in table(records)


def test_a_finished_chain_is_left_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    run_script("scripts/train.py", *FLAGS, f"--workdir={whole}", check=True)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}


def small():
    chain = get_config("pipeline,smoke")
    for config in chain.stages().values():
        config.steps = config.checkpoint_every = config.sample_every = config.log_every = 2
    return chain


def test_one_stage_alone(whole, tmp_path):
    assert [row["stage"] for row in run_chain(small(), tmp_path, "pre_training")] == ["pre_training"]
    assert [row["stage"] for row in run_chain(small(), tmp_path, "mid_training")] == ["mid_training"]
    with pytest.raises(UserError, match=r"^stage=last: choose one of pre_training"):
        run_chain(small(), tmp_path, "last")
    with pytest.raises(UserError, match=r"^config\.post_training\.init_from=.*mid_training"):
        run_chain(small(), tmp_path / "empty", "post_training")


def test_a_mistake_in_a_later_stage_is_found_before_the_first(tmp_path):
    chain = small()
    chain.post_training.batch = 0
    with pytest.raises(UserError, match=r"^config\.post_training\.batch"):
        run_chain(chain, tmp_path / "a")
    chain = small()
    chain.mid_training.teacher = "post_training"
    with pytest.raises(UserError, match=r"^config\.mid_training\.teacher=post_training: that stage does not come"):
        run_chain(chain, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_earlier_stage_may_be_the_teacher(tmp_path):
    chain = small()
    chain.post_training.teacher = "pre_training"
    assert placed(chain, tmp_path)["post_training"].teacher == str(tmp_path / "pre_training")
    assert isinstance(chain, Chain)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([*FLAGS, "--dry_run", "--stage=mid_training"], "--stage=mid_training"),
        (["--config=configs/digits.py:lagrangian,smoke", "--stage=mid_training"], "--stage=mid_training"),
        ([*FLAGS, "--config.post_training.bath=3"], "bath"),
    ],
)
def test_mistakes_are_one_line(flags, reason, tmp_path):
    done = run_script("scripts/train.py", *flags, f"--workdir={tmp_path}/a")
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_a_dry_run_tries_all_stages(tmp_path):
    done = run_script("scripts/train.py", *FLAGS, "--dry_run", f"--workdir={tmp_path}", check=True)
    assert all(f"{stage} loss of two steps" in done.stdout for stage in STAGES)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"dry-run-{stage}.png" for stage in STAGES)


def test_init_ema_and_init_fresh(whole):
    """init_ema takes raw or averaged weights of the run's last checkpoint, init_fresh leaves parameters random."""
    config, before = get_config("pipeline,smoke").post_training, whole / "mid_training"
    config.init_from = str(before)
    for which, file in (("", "ema-0.99"), ("raw", "network"), ("0.99", "ema-0.99")):
        config.init_ema = which
        assert_same(Trainer.build(config).module.fm.network.state_dict(), weights(before, file))
    config.init_fresh = ("head",)
    made, stored = Trainer.build(config).module.fm.network.state_dict(), weights(before, "ema-0.99")
    fresh = {name for name in stored if not torch.equal(made[name], stored[name])}
    assert fresh and all(name.startswith("head") for name in fresh)
    for field, value, reason in (
        ("init_fresh", ("nose",), "^init_fresh=nose"),
        ("init_ema", "0.5", r"init_ema=0\.5: .* has 0\.99, raw"),
    ):
        setattr(config, field, value)
        with pytest.raises(UserError, match=reason):
            Trainer.build(config)
        config.init_fresh = ()
    config.init_from, config.init_ema = str(before / "model"), "raw"
    with pytest.raises(UserError, match=r"init_ema=raw: .*is not a run with checkpoints"):
        Trainer.build(config)


def test_the_choice_of_weights_is_part_of_the_run(whole, tmp_path):
    config = get_config("pipeline,smoke").post_training
    config.init_from, config.steps, config.checkpoint_every = str(whole / "mid_training"), 2, 1
    train(config, tmp_path)
    config.init_ema = "raw"
    with pytest.raises(UserError, match=r"^config\.init_ema: differs"):
        train(config, tmp_path)
    assert load_file(tmp_path / "model/network/diffusion_pytorch_model.safetensors")
