"""A run that is killed, robbed of its workers and damaged on disk ends with the weights of one that was left alone."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from helpers.runs import assert_same
from safetensors.torch import load_file

from flowmaps.run_weights import list_checkpoints

KILLS = 25
STEPS = 400
IN_ROOT = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


def command(workdir):
    flags = [f"--config.steps={STEPS}", "--config.checkpoint_every=5", "--config.log_every=5", "--config.keep=3"]
    flags += ["--config.sample_every=1000", "--config.data.workers=1", "--config.batch=8", "--config.ema=(0.9,0.99)"]
    flags += ["--config.ema_widths=(0.05,0.1)", "--config.snapshot_every=100", "--config.optim.spike=50"]
    row = "--config=configs/digits.py:lagrangian,smoke"
    return [sys.executable, "scripts/train.py", row, f"--workdir={workdir}", *flags]


def start(workdir):
    """As a shell starts it, which says 137 for a process that was killed."""
    shell = ["sh", "-c", f"{shlex.join(command(workdir))} & echo $! ; wait $! ; exit $?"]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **IN_ROOT)
    return process, int(process.stdout.readline())


def events(workdir, name):
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == name]


def started(workdir, process, latest):
    """Wait until training is under way: a checkpoint after ``latest``."""
    while process.poll() is None and list_checkpoints(workdir)[-1:] in ([], [latest]):
        time.sleep(0.01)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def damage(file, way, chance):
    content = bytearray(file.read_bytes())
    if way == "cut":
        content = content[: chance.randrange(len(content))]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


@pytest.mark.slow
def test_killed_robbed_and_damaged(tmp_path):
    """25 times -9 at a random moment; after every third a file of the last checkpoint is cut or a bit of it flipped."""
    chance, run, whole = random.Random(0), tmp_path / "run", tmp_path / "whole"
    subprocess.run(command(whole), check=True, capture_output=True, **IN_ROOT)
    seen = {"killed": 0, "resumed": 0, "refused": 0, "robbed": 0}
    latest = None
    while seen["killed"] < KILLS:
        process, pid = start(run)
        started(run, process, latest)
        assert process.poll() is None, f"too fast or refused: {process.stderr.read()[-2000:]}"
        seen["resumed"] += len(events(run, "resume")[-1:]) if latest else 0
        assert not latest or events(run, "resume")[-1]["step"] > 0
        time.sleep(chance.uniform(0, 0.3))
        if seen["killed"] % 5 == 4 and seen["robbed"] < seen["killed"] // 5 + 1 and children(pid):
            os.kill(children(pid)[0], signal.SIGKILL)  # a data worker
            _, error = process.communicate(timeout=120)
            lines = [line for line in error.splitlines() if "error:" in line or "Traceback" in line]
            assert process.returncode == 2 and len(lines) == 1 and "a data worker ended" in lines[0], error
            seen["robbed"] += 1
        else:
            os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=120)
            assert process.returncode == 137
            seen["killed"] += 1
        latest = list_checkpoints(run)[-1]
        if seen["killed"] % 3 == 2 and len(list_checkpoints(run)) > 1:
            file = chance.choice(sorted(path for path in latest.iterdir() if path.is_file()))
            damage(file, chance.choice(["cut", "flip"]), chance)
            refused = subprocess.run(command(run), capture_output=True, check=False, **IN_ROOT)
            lines = refused.stderr.strip().splitlines()
            assert refused.returncode == 2 and len(lines) == 1 and str(file) in lines[0], refused.stderr
            remedy = re.search(r"delete (\S+) to resume", lines[0])[1]
            subprocess.run(["rm", "-r", remedy], check=True)
            seen["refused"] += 1
            latest = list_checkpoints(run)[-1]
    assert latest.name < f"step-{STEPS:08d}"
    subprocess.run(command(run), check=True, capture_output=True, **IN_ROOT)
    a, b = (list_checkpoints(directory)[-1] for directory in (whole, run))
    assert a.name == b.name == f"step-{STEPS:08d}"
    names = sorted(path.name for path in a.iterdir() if path.suffix == ".safetensors")
    assert names == sorted(path.name for path in b.iterdir() if path.suffix == ".safetensors")
    for name in names:
        assert_same(load_file(a / name), load_file(b / name))
    for name in (f"step-{k:08d}.safetensors" for k in range(100, STEPS + 1, 100)):
        assert_same(load_file(whole / "snapshots" / name), load_file(run / "snapshots" / name))
    print(seen)
    assert seen["killed"] == KILLS and seen["resumed"] >= KILLS - 1 and seen["refused"] >= 5 and seen["robbed"] >= 3
