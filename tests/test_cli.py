"""The command lines as a user types them: what they write, and how they refuse."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from PIL import Image
from safetensors.torch import load_file

CHECKER = "--config=configs/checkerboard.py:lagrangian,smoke"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs made by train.py: a map of digits and a drift of points."""
    base = tmp_path_factory.mktemp("runs")
    run_script("scripts/train.py", "--config=configs/digits.py:lagrangian,smoke", f"--workdir={base}/map", check=True)
    drift = "--config=configs/checkerboard.py:flow_matching,smoke"
    run_script("scripts/train.py", drift, f"--workdir={base}/drift", check=True)
    return base


def refused(done):
    """Exit code 2 and one line on stderr: returns the line."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "error:" in lines[0] and not done.stdout
    assert "Traceback" not in lines[0] and len(lines[0]) < 400
    return lines[0]


TRAIN_MISTAKES = {
    "unknown key": (
        ["--config=configs/digits.py:lagrangian", "--config.optim.lrr=1", "--workdir={tmp}/a"],
        "--config.optim.lrr:",
    ),
    "unknown row": (["--config=configs/digits.py:nonsense", "--workdir={tmp}/a"], "lagrangian"),
    "unknown variant": (["--config=configs/digits.py:lagrangian,fast", "--workdir={tmp}/a"], "smoke"),
    "missing file": (["--config=configs/nothing.py:lagrangian", "--workdir={tmp}/a"], "configs/nothing.py"),
    "bad value": ([CHECKER, "--config.steps=many", "--workdir={tmp}/a"], "steps"),
    "bad enum": ([CHECKER, "--config.optim.decay=never", "--workdir={tmp}/a"], "decay"),
    "bad number": ([CHECKER, "--config.steps=0", "--workdir={tmp}/a"], "--config.steps"),
    "bad share": ([CHECKER, "--config.objective.diagonal=2", "--workdir={tmp}/a"], "diagonal"),
    "unknown data": ([CHECKER, "--config.data.name=moon", "--workdir={tmp}/a"], "moon"),
    "no such width": ([CHECKER, "--config.network.width=0", "--workdir={tmp}/a"], "width"),
    "other target": ([CHECKER, "--config.network.target=UNet", "--workdir={tmp}/a"], "--config.network"),
    "no target": ([CHECKER, "--config.objective.target=magic", "--workdir={tmp}/a"], "lagrangian"),
    "other shape": ([CHECKER, "--config.data.name=digits", "--workdir={tmp}/a"], "digits"),
    "bad betas": ([CHECKER, "--config.optim.betas=(2.0,3.0)", "--workdir={tmp}/a"], "betas"),
    "unknown flag": ([CHECKER, "--wrkdir={tmp}/a"], "wrkdir"),
    "stray argument": ([CHECKER, "--workdir={tmp}/a", "extra"], "extra"),
    "no config": (["--workdir={tmp}/a"], "--config"),
    "no workdir": ([CHECKER], "--workdir"),
    "unwritable workdir": ([CHECKER, "--workdir=/proc/nowhere"], "--workdir"),
}


@pytest.mark.parametrize(("arguments", "named"), TRAIN_MISTAKES.values(), ids=TRAIN_MISTAKES)
def test_train_mistakes(tmp_path, arguments, named):
    line = refused(run_script("scripts/train.py", *[a.format(tmp=tmp_path) for a in arguments]))
    assert named in line
    assert not (tmp_path / "a").exists()


SAMPLE_MISTAKES = {
    "steps 0": (["--checkpoint={runs}/map", "--steps=0"], "--steps"),
    "steps word": (["--checkpoint={runs}/map", "--steps=few"], "--steps"),
    "label out of range": (["--checkpoint={runs}/map", "--label=11"], "label"),
    "negative label": (["--checkpoint={runs}/map", "--label=-1"], "label"),
    "no label": (["--checkpoint={runs}/map", "--label=10"], "label"),
    "label of unconditional": (["--checkpoint={runs}/drift", "--sampler=euler", "--label=1"], "label"),
    "map of a drift": (["--checkpoint={runs}/drift", "--sampler=map"], "--sampler=euler"),
    "no checkpoint there": (["--checkpoint={tmp}"], "model_index.json"),
    "unwritable out": (["--checkpoint={runs}/map", "--out=/proc/nowhere"], "--out"),
    "unknown sampler": (["--checkpoint={runs}/map", "--sampler=magic"], "sampler"),
    "truncated weights": (["--checkpoint={truncated}"], "diffusion_pytorch_model.safetensors"),
}


@pytest.mark.parametrize(("arguments", "named"), SAMPLE_MISTAKES.values(), ids=SAMPLE_MISTAKES)
def test_sample_mistakes(tmp_path, runs, arguments, named):
    import shutil

    truncated = tmp_path / "truncated"
    shutil.copytree(runs / "map" / "model", truncated)
    weights = truncated / "network" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    out = tmp_path / "out"
    given = [a.format(tmp=tmp_path, runs=runs, truncated=truncated) for a in arguments]
    line = refused(run_script("scripts/sample.py", f"--out={out}", *given))
    assert named in line
    assert not out.exists()


def test_sample_writes_what_it_says(tmp_path, runs):
    command = ["scripts/sample.py", f"--checkpoint={runs}/map", "--steps=1,2", "--num=12"]
    run_script(*command, f"--out={tmp_path}/a", check=True)
    run_script(*command, f"--out={tmp_path}/b", "--batch=5", check=True)
    archive = np.load(tmp_path / "a" / "samples-2.npz")
    assert archive["samples"].shape == (12, 8, 8, 1) and archive["samples"].dtype == np.uint8
    assert archive["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    again = np.load(tmp_path / "b" / "samples-2.npz")["samples"]
    assert np.abs(archive["samples"].astype(int) - again).max() <= 1  # the batch size does not matter
    image = Image.open(tmp_path / "a" / "steps-2" / "000007.png")
    assert np.array_equal(np.asarray(image), archive["samples"][7, :, :, 0])
    assert len(list((tmp_path / "a" / "steps-1").iterdir())) == 12 and (tmp_path / "a" / "grid.png").is_file()


def test_sample_points_and_one_class(tmp_path, runs):
    points = ["--sampler=euler", "--steps=3", "--num=50", f"--out={tmp_path}/points"]
    run_script("scripts/sample.py", f"--checkpoint={runs}/drift", *points, check=True)
    assert np.load(tmp_path / "points" / "samples-3.npz")["samples"].shape == (50, 2)
    threes = ["--label=3", "--steps=1", "--num=4", f"--out={tmp_path}/threes"]
    run_script("scripts/sample.py", f"--checkpoint={runs}/map", *threes, check=True)
    assert np.load(tmp_path / "threes" / "samples-1.npz")["label"].tolist() == [3, 3, 3, 3]


def test_overrides_and_dry_run(tmp_path):
    done = run_script(
        "scripts/train.py", CHECKER, "--config.network.width=24", "--dry_run", f"--workdir={tmp_path}/dry", check=True
    )
    assert "parameters: " in done.stdout and "loss of two steps" in done.stdout
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["dry-run.png"]


def start_training(workdir, *extra):
    command = [
        sys.executable,
        "scripts/train.py",
        CHECKER,
        "--config.steps=400",
        "--config.checkpoint_every=20",
        "--config.sample_every=400",
        *extra,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)


def wait_for_checkpoint(workdir, process):
    for _ in range(600):
        if list(workdir.glob("checkpoints/step-*")):
            return
        assert process.poll() is None, "training ended before its first checkpoint was seen"
        time.sleep(0.1)
    raise AssertionError("no checkpoint within a minute")


def final_weights(workdir):
    return load_file(workdir / "checkpoints" / "step-00000400" / "network.safetensors")


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    """kill -9 in the middle, the same command again: a resume event, and weights equal to an uninterrupted run."""
    whole = start_training(tmp_path / "whole")
    assert whole.wait(timeout=240) == 0
    process = start_training(tmp_path / "killed")
    wait_for_checkpoint(tmp_path / "killed", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000400").exists()
    assert start_training(tmp_path / "killed").wait(timeout=240) == 0
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    resumed = [row for row in rows if row.get("event") == "resume"]
    assert len(resumed) == 1 and resumed[0]["step"] > 0
    a, b = final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_writes_a_checkpoint_and_exits_0(tmp_path, number):
    process = start_training(tmp_path, "--config.checkpoint_every=7")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped" and last["signal"] == number.name
    assert (tmp_path / "checkpoints" / f"step-{last['step']:08d}" / "state.json").is_file()
