"""The command lines as a user types them: what they write, and how they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from helpers.makers import write_folder, zoo
from PIL import Image
from safetensors.torch import load_file

from flowmaps import FlowMap

CHECKER = "--config=configs/checkerboard.py:lagrangian,smoke"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs made by train.py: maps of digits, plain and guided, a consistency model, and a drift of points."""
    base = tmp_path_factory.mktemp("runs")
    for name, row in (("map", "lagrangian"), ("guided", "lagrangian_guided"), ("consistency", "consistency")):
        config = f"--config=configs/digits.py:{row},smoke"
        run_script("scripts/train.py", config, f"--workdir={base}/{name}", check=True)
    drift = "--config=configs/checkerboard.py:flow_matching,smoke"
    run_script("scripts/train.py", drift, f"--workdir={base}/drift", check=True)
    return base


def refused(done, most=400):
    """Exit code 2 and one line on stderr of at most ``most`` characters: returns the line."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "error:" in lines[0] and not done.stdout
    assert "Traceback" not in lines[0] and len(lines[0]) < most
    return lines[0]


TRAIN_MISTAKES = {
    "unknown key": (
        ["--config=configs/digits.py:lagrangian", "--config.optim.lrr=1", "--workdir={tmp}/a"],
        "--config.optim.lrr:",
    ),
    "unknown row": (["--config=configs/checkerboard.py:nonsense", "--workdir={tmp}/a"], "lagrangian"),
    "unknown variant": (["--config=configs/digits.py:lagrangian,fast", "--workdir={tmp}/a"], "smoke"),
    "missing file": (["--config=configs/nothing.py:lagrangian", "--workdir={tmp}/a"], "configs/nothing.py"),
    "bad value": ([CHECKER, "--config.steps=many", "--workdir={tmp}/a"], "steps"),
    "bad enum": ([CHECKER, "--config.optim.decay=never", "--workdir={tmp}/a"], "decay"),
    "bad number": ([CHECKER, "--config.steps=0", "--workdir={tmp}/a"], "--config.steps"),
    "bad share": ([CHECKER, "--config.objective.diagonal=2", "--workdir={tmp}/a"], "diagonal"),
    "unknown data": ([CHECKER, "--config.data.name=moon", "--workdir={tmp}/a"], "moon"),
    "no such width": ([CHECKER, "--config.network.width=0", "--workdir={tmp}/a"], "width"),
    "other target": ([CHECKER, "--config.network.name=UNet", "--workdir={tmp}/a"], "--config.network"),
    "no target": ([CHECKER, "--config.objective.name=magic", "--workdir={tmp}/a"], "--config.objective.name"),
    "best of nothing": ([CHECKER, "--config.best.metric=FID", "--workdir={tmp}/a"], "--config.best.metric"),
    "flipped points": ([CHECKER, "--config.data.flip", "--workdir={tmp}/a"], "--config.data.flip"),
    "no labels to drop": ([CHECKER, "--config.data.label_dropout=0.1", "--workdir={tmp}/a"], "label_dropout"),
    "no workers": ([CHECKER, "--config.data.workers=-1", "--workdir={tmp}/a"], "--config.data.workers"),
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
    "label of no class": (
        ["--checkpoint=assets/fashion_mnist", "--label=boat"],
        "did you mean Coat?",
    ),
    "label of unconditional": (["--checkpoint={runs}/drift", "--sampler=euler", "--label=1"], "label"),
    "map of a drift": (["--checkpoint={runs}/drift", "--sampler=map"], "(sampler=euler)"),
    "guidance of a plain model": (["--checkpoint={runs}/map", "--guidance=2"], "--guidance"),
    "too much guidance": (["--checkpoint={runs}/guided", "--guidance=5"], "from 1 to 4"),
    "steps of a consistency model": (["--checkpoint={runs}/consistency", "--steps=2"], "(sampler=stochastic"),
    "drift of a consistency model": (["--checkpoint={runs}/consistency", "--sampler=euler", "--steps=1"], "jumps"),
    "half a jump to data": (["--checkpoint={runs}/consistency", "--sampler=stochastic", "--gamma=0.5"], "gamma=1)"),
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
    said = run_script(*command, f"--out={tmp_path}/a", check=True).stdout
    assert said.startswith(f"model    {runs}/map: a map of images of 1 x 8 x 8, ema 0.99, seed 0\n")
    for line in (
        "samples  1 step, map, uniform steps: 12 images, ",
        "samples  2 steps, map, uniform steps: 12 images, ",
    ):
        assert re.search(line + r"[\d.e+]+ images/s\n", said)
    assert f"wrote    {tmp_path}/a/: grid.png, samples-N.npz, steps-N/*.png\n" in said
    score = f"--checkpoint={runs}/map --reference=digits:heldout --steps=1,2 --num=2000"
    assert said.endswith(f"next     python scripts/fid.py {score}\n")
    run_script(*command, f"--out={tmp_path}/b", "--batch=5", check=True)
    archive = np.load(tmp_path / "a" / "samples-2.npz")
    assert archive["arr_0"].shape == (12, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
    assert archive["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    again = np.load(tmp_path / "b" / "samples-2.npz")["arr_0"]
    assert np.abs(archive["arr_0"].astype(int) - again).max() <= 1  # the batch size does not matter
    image = Image.open(tmp_path / "a" / "steps-2" / "000007.png")
    assert np.array_equal(np.asarray(image), archive["arr_0"][7, :, :, 0])
    assert len(list((tmp_path / "a" / "steps-1").iterdir())) == 12 and (tmp_path / "a" / "grid.png").is_file()


def test_another_sampler_beside(tmp_path, runs):
    """Left the grid as without it, right that of the other sampler from the same noise; what it forbids is refused."""
    command = ["scripts/sample.py", "--steps=1,2", "--num=6"]
    for out, flags in (("map", []), ("euler", ["--sampler=euler"]), ("both", ["--beside=euler"])):
        run_script(*command, f"--checkpoint={runs}/map", f"--out={tmp_path}/{out}", *flags, check=True)
    left, right, both = (np.asarray(Image.open(tmp_path / out / "grid.png")) for out in ("map", "euler", "both"))
    assert np.array_equal(both[:, : left.shape[1]], left) and np.array_equal(both[:, -right.shape[1] :], right)
    line = refused(
        run_script(*command, f"--checkpoint={runs}/drift", "--sampler=euler", "--beside=map", f"--out={tmp_path}/no")
    )
    assert "drift" in line and not (tmp_path / "no").exists()


def test_sample_points_and_one_class(tmp_path, runs):
    points = ["--sampler=euler", "--steps=3", "--num=50", f"--out={tmp_path}/points"]
    run_script("scripts/sample.py", f"--checkpoint={runs}/drift", *points, check=True)
    assert np.load(tmp_path / "points" / "samples-3.npz")["arr_0"].shape == (50, 2)
    threes = ["--label=3", "--steps=1", "--num=4", f"--out={tmp_path}/threes"]
    said = run_script("scripts/sample.py", f"--checkpoint={runs}/map", *threes, check=True).stdout
    assert "samples  1 step, map, uniform steps, label 3: 4 images, " in said
    assert np.load(tmp_path / "threes" / "samples-1.npz")["label"].tolist() == [3, 3, 3, 3]
    assert FlowMap.from_pretrained(runs / "map").info.class_names == tuple("0123456789")
    boots = ["--checkpoint=assets/fashion_mnist", "--label=boot", "--steps=1", "--num=2", f"--out={tmp_path}/boots"]
    run_script("scripts/sample.py", *boots, check=True)
    assert np.load(tmp_path / "boots" / "samples-1.npz")["label"].tolist() == [9, 9]


def test_sample_with_guidance_and_from_a_consistency_model(tmp_path, runs):
    kinds = {"guided": ["--guidance=3", "--steps=1,2"], "consistency": ["--sampler=stochastic", "--steps=1,2"]}
    for name, flags in kinds.items():
        command = [f"--checkpoint={runs}/{name}", "--num=10", f"--out={tmp_path}/{name}", *flags]
        run_script("scripts/sample.py", *command, check=True)
        assert np.load(tmp_path / name / "samples-2.npz")["label"].tolist() == list(range(10))
    info = FlowMap.from_pretrained(runs / "guided").info
    assert info.guidance_max == 4 and info.guidance is None and info.label_dropout == 0.1


def test_overrides_and_dry_run(tmp_path):
    done = run_script(
        "scripts/train.py", CHECKER, "--config.network.width=24", "--dry_run", f"--workdir={tmp_path}/dry", check=True
    )
    assert "parameters: " in done.stdout and "loss of two steps" in done.stdout
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["dry-run.png"]


@pytest.fixture(scope="module")
def cifar(data_root):
    """CIFAR-10 in files of its true layout, and a network small enough for a test."""
    config = ["--config=configs/cifar10.py:lagrangian,smoke", f"--config.data.root={data_root}"]
    return [*config, "--config.network.width=8", "--config.sample_every=20", "--config.checkpoint_every=10"]


@pytest.mark.slow
def test_cifar10_dry_run_train_resume_sample(tmp_path, cifar):
    shown = run_script("scripts/train.py", *cifar, "--dry_run", check=True).stdout
    assert "cifar10, 300 samples of shape (3, 32, 32)" in shown
    run = f"--workdir={tmp_path}/run"
    run_script("scripts/train.py", *cifar, run, "--config.steps=20", check=True)
    run_script("scripts/train.py", *cifar, run, "--config.steps=25", check=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"event": "resume", "step": 20} in rows and rows[-1]["step"] == 25
    flags = [f"--checkpoint={tmp_path}/run", "--steps=1,4", "--num=4", f"--out={tmp_path}/out"]
    run_script("scripts/sample.py", *flags, check=True)
    assert np.load(tmp_path / "out" / "samples-4.npz")["arr_0"].shape == (4, 32, 32, 3)
    with Image.open(tmp_path / "out" / "steps-1" / "000000.png") as image:
        assert image.mode == "RGB"


@pytest.mark.slow
def test_a_folder_of_all_kinds_trains_once_the_bad_files_are_skipped(tmp_path):
    good, bad = zoo()
    root = write_folder(tmp_path / "zoo", good | bad | {"notes.txt": b"hello"})
    (root / "dog" / "loop").symlink_to(root)
    config = ["--config=configs/folder.py:lagrangian,smoke", f"--config.data.root={root}"]
    small = ["--config.network.image_size=16", "--config.network.width=8", "--config.network.attention_resolutions=()"]
    small += ["--config.network.num_classes=2", "--config.steps=2", "--config.batch=4", "--config.data.flip"]
    line = refused(run_script("scripts/train.py", *config, *small, f"--workdir={tmp_path}/run"), most=1000)
    assert all(name in line for name in bad) and not (tmp_path / "run").exists()
    small.append("--config.data.skip_corrupt")
    shown = run_script("scripts/train.py", *config, *small, "--dry_run", check=True).stdout
    assert "classes: cat, dog" in shown and all(name in shown for name in [*bad, "notes.txt", "dog/loop"])
    run_script("scripts/train.py", *config, *small, f"--workdir={tmp_path}/run", check=True)
    stats = ["--size=16", "--skip_corrupt", "--extractor=digits", f"--out={tmp_path}/s.npz"]
    done = run_script("scripts/stats.py", f"--data={root}", *stats)
    assert done.returncode == 2 and "half.jpg" in done.stderr  # named, left out, and on to an extractor made for digits
    assert "takes images of shape (1, 8, 8), got (3, 16, 16)" in done.stderr.splitlines()[-1]
    run_script(
        "scripts/sample.py", f"--checkpoint={tmp_path}/run", "--steps=1", "--num=2", f"--out={tmp_path}/o", check=True
    )


def test_download_is_by_flag_alone(tmp_path, cifar):
    """Without the flag the missing file is named; the flag itself needs a network, which a test must not have."""
    root = f"--config.data.root={tmp_path}"
    line = refused(run_script("scripts/train.py", cifar[0], root, f"--workdir={tmp_path}/run"))
    assert "data_batch_1 is missing" in line and "data.root" in line and "data.download" in line
    assert not list(tmp_path.iterdir())


def start_training(workdir, *extra):
    command = [
        sys.executable,
        "scripts/train.py",
        CHECKER,
        "--config.steps=200",
        "--config.checkpoint_every=20",
        "--config.sample_every=200",
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
    return load_file(workdir / "checkpoints" / "step-00000200" / "network.safetensors")


@pytest.mark.slow  # of the quick ones, tests/test_chain.py kills
def test_killed_run_resumes_to_the_same_weights(tmp_path):
    """kill -9 in the middle, the same command again: a resume event, and weights equal to an uninterrupted run."""
    whole = start_training(tmp_path / "whole")
    assert whole.wait(timeout=240) == 0
    process = start_training(tmp_path / "killed")
    wait_for_checkpoint(tmp_path / "killed", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000200").exists()
    assert start_training(tmp_path / "killed").wait(timeout=240) == 0
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    resumed = [row for row in rows if row.get("event") == "resume"]
    assert len(resumed) == 1 and resumed[0]["step"] > 0
    a, b = final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_polite_stop_writes_a_checkpoint_and_exits_0(tmp_path, number):
    process = start_training(tmp_path, "--config.checkpoint_every=7")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped" and last["signal"] == number.name
    assert (tmp_path / "checkpoints" / f"step-{last['step']:08d}" / "state.json").is_file()
