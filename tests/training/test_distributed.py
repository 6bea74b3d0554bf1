"""Two processes are one process with two micro-steps: losses, weights, averages, scores and checkpoints."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from helpers import ROOT, run_script, run_two
from helpers.runs import assert_same
from helpers.two_processes import CONDITIONS, DRIFT, MODES, config_of, run

from flowmaps import UserError
from flowmaps.data import open_dataset
from flowmaps.run_weights import list_checkpoints, read_checkpoint
from training.config_rows import METHODS
from training.trainer import Trainer

QUICK = ["lagrangian"]
ROWS = [*METHODS, "lagrangian_guided", "lagrangian_edm2", "mid_training", "straightening", "lagrangian_dit"]
ROWS += ["lagrangian_dit_muon", "lagrangian_muon", "imf", "lagrangian_told"]
SLOW = [row for row in ROWS if row not in QUICK]
DIGITS = "--config=configs/digits.py:lagrangian,smoke"


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    flow = "--config=configs/digits.py:flow_matching,smoke"
    run_script("scripts/train.py", flow, f"--workdir={out}/{DRIFT}", "--config.steps=2", check=True)
    rows = len(open_dataset("digits", "train"))
    np.save(out / CONDITIONS, np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32))
    return out


def made_by_two(out, rows):
    run_two("tests/helpers/two_processes.py", out, *rows, timeout=3000)
    return out


@pytest.fixture(scope="module")
def quick(drift):
    return made_by_two(drift, QUICK)


@pytest.fixture(scope="module")
def every(drift):
    return made_by_two(drift, SLOW)


def assert_equal_to_one_process(row, out):
    losses, weights, averages = run(config_of(row, out, accumulate=2))
    assert len(set(losses.tolist())) > 15  # it does train
    for mode in MODES:
        for rank in (0, 1):
            theirs = torch.load(out / f"{mode}-{row}-{rank}.pt")
            torch.testing.assert_close(theirs[0], losses, rtol=1e-5, atol=1e-5)
            for ours, other in ((weights, theirs[1]), (averages, theirs[2])):
                assert ours.keys() == other.keys()
                for name, value in ours.items():
                    torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=f"{mode} {rank} {name}")


@pytest.mark.parametrize("row", QUICK)
def test_two_processes_equal_two_micro_steps(row, quick):
    assert_equal_to_one_process(row, quick)


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW)
def test_two_processes_equal_two_micro_steps_for_every_row(row, every):
    assert_equal_to_one_process(row, every)


def train_two(workdir, *flags):
    """By its files, not by the launcher's exit code."""
    done = run_two("scripts/train.py", DIGITS, f"--workdir={workdir}", *flags)
    state, tensors = read_checkpoint(list_checkpoints(workdir)[-1])
    assert state["step"] == 4, done.stderr
    return tensors


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [("two shard", "one"), ("one", "two shard"), ("two shard", "two")])
def test_a_checkpoint_does_not_know_how_many_processes_wrote_it(tmp_path, ways):
    """4 steps, against 2 by one way and 2 by the other: every tensor, the judge's scores and the export are equal."""
    flags = ["--config.steps=4", "--config.checkpoint_every=2", "--config.log_every=2", "--config.sample_every=4"]
    flags += ["--config.best.metric=FD-digits", "--config.best.num=41", "--config.best.every=2"]
    flags += ["--config.ema_widths=(0.05,0.1)", "--config.snapshot_every=2", "--config.optim.spike=9"]

    def go(way, workdir):
        if way == "one":
            two = "--config.accumulate=2"
            run_script("scripts/train.py", DIGITS, f"--workdir={workdir}", two, *flags, check=True)
            return read_checkpoint(list_checkpoints(workdir)[-1])[1]
        return train_two(workdir, *flags, *(["--config.shard"] if "shard" in way else []))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = go("one", whole)
    go(ways[0], parts)
    shutil.rmtree(list_checkpoints(parts)[-1])
    found = go(ways[1], parts)
    assert {"event": "resume", "step": 2} in rows_of(parts)
    assert found.keys() == expected.keys()
    logs = [next(row for row in rows_of(d) if row["step"] == 4 and "loss" in row) for d in (whole, parts)]
    for name in ("loss", "diagonal", "off_diagonal"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4)
    for name, numbers in logs[0]["residuals"].items():
        assert logs[1]["residuals"][name] == pytest.approx(numbers, rel=1e-4), name
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(found[file][name], value, rtol=1e-4, atol=1e-5)
    scores = [[row["FD-digits@1"] for row in rows_of(d) if "FD-digits@1" in row] for d in (whole, parts)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3) and len(scores[0]) == 2
    narrow = run_script("scripts/export.py", f"--checkpoint={parts}", "--ema=0.07", f"--out={tmp_path}/out", check=True)
    assert "ema 0.07" in narrow.stdout


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    flags = ["--config.steps=2000", "--config.checkpoint_every=5", "--config.sample_every=2000"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", "scripts/train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, DIGITS, f"--workdir={tmp_path}", *flags]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list_checkpoints(tmp_path):
            time.sleep(0.1)
        os.kill(int((tmp_path / ".lock").read_text().split()[1]), signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    stopped = rows_of(tmp_path)[-1]
    assert stopped["event"] == "stopped" and stopped["signal"] == "SIGTERM"
    assert read_checkpoint(list_checkpoints(tmp_path)[-1])[0]["step"] == stopped["step"]
    said = re.findall(r"stopped by (.*) at step (\d+); resume", error)
    assert {step for _, step in said} == {str(stopped["step"])} and len(said) == 2, error


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_script(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_cpu_threads_per_process=1",
        "scripts/train.py",
    ]
    command = [*launch, DIGITS, "--config.steps=4", f"--workdir={tmp_path}/a"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    run_script("scripts/train.py", DIGITS, "--config.steps=4", f"--workdir={tmp_path}/b", check=True)
    a, b = (read_checkpoint(list_checkpoints(tmp_path / run)[-1])[1] for run in "ab")
    for file in a:
        assert_same(a[file], b[file])


def test_more_processes_are_more_images_at_a_time_and_the_same_batch(drift):
    """The parts of a global batch are the same items, however many share it."""
    config = config_of("lagrangian", drift)
    seen = []
    for accumulate in (1, 2, 4):
        config.accumulate = accumulate
        trainer = Trainer.build(config)
        seen.append(torch.cat([trainer.loader.batch(3 * accumulate + micro)[0] for micro in range(accumulate)]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_sharding_needs_processes_and_is_ours_alone(drift, monkeypatch):
    with pytest.raises(UserError, match=r"^shard: needs several processes"):
        Trainer.build(config_of("lagrangian", drift, shard=True))
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"^shard: accelerate"):
        Trainer.build(config_of("lagrangian", drift))


@pytest.mark.slow
@pytest.mark.parametrize("row", list(METHODS))
def test_compiled_equals_eager(row, drift):
    """By inductor, 20 optimiser steps of the points' network: losses and weights."""
    from configs.checkerboard import get_config

    results = []
    for compiled in (False, True):
        config = get_config(f"{row},smoke")
        config.steps, config.batch, config.compile = 20, 16, compiled
        results.append(run(config))
    torch._dynamo.reset()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-5)


class Two:
    """Two processes of train.py that need no launcher, so that each has its own flags, exit code and output."""

    def __init__(self, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "scripts/train.py", *own],
                cwd=ROOT,
                env={**os.environ, **common, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, own in enumerate(flags)
        ]

    def ended(self, rank, limit=90):
        """Return the exit code and the lines that are not of the log."""
        error = self.processes[rank].communicate(timeout=limit)[1]
        return self.processes[rank].returncode, [x for x in error.splitlines() if not x.startswith(("step", "note"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["--config.batch=32"], "--config.batch: is 16 in process 0 and 32 in process 1"),
        (["--config.steps=0"], "--config.steps: is 4 in process 0 and 0 in process 1"),
        (["--config=configs/digits.py:pipeline,smoke"], " in process 0 and nothing in process 1"),
        ([], "has log.jsonl, which no run of flowmaps wrote"),  # which the first process alone finds
    ],
)
def test_a_mistake_of_one_process_is_the_same_line_in_both(tmp_path, others, said):
    flags = [DIGITS, f"--workdir={tmp_path}", "--config.steps=4"]
    theirs = [others[0], flags[1]] if others and others[0].startswith("--config=") else [*flags, *others]
    if not others:
        (tmp_path / "log.jsonl").write_text("mine")
    two = Two(flags, theirs)
    found = [two.ended(rank) for rank in (0, 1)]
    assert found[0] == found[1] and found[0][0] == 2 and len(found[0][1]) == 1, found
    assert said in found[0][1][0] and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"] * (not others)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(tmp_path):
    flags = [DIGITS, f"--workdir={tmp_path}", "--config.steps=100000", "--config.timeout=3"]
    two = Two(flags, flags)
    while two.processes[0].poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
    two.processes[1].send_signal(signal.SIGSTOP)
    code, lines = two.ended(0)
    two.processes[1].send_signal(signal.SIGCONT)
    assert code == 2 and len(lines) == 1 and "--config.timeout=3: a process did not answer for 3 s" in lines[0], lines
    assert two.ended(1)[0] == 2
