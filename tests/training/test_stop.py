"""Signals to a run and to a chain."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from flowmaps.run_weights import list_checkpoints
from training.checkpoint import read_state
from training.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize("row", ["lagrangian", "pipeline"])
@pytest.mark.parametrize("times", [1, 2])
def test_signals_to_train(tmp_path, row, times):
    """One: a checkpoint and exit code 0. Two: one line and exit code 130; the last checkpoint stays."""
    stage = "pre_training." * (row == "pipeline")
    flags = [f"--config=configs/digits.py:{row},smoke", f"--workdir={tmp_path}"]
    flags += [f"--config.{stage}{name}" for name in ("steps=100000", "sample_every=100000", "checkpoint_every=1")]
    run = tmp_path / "pre_training" if row == "pipeline" else tmp_path
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list_checkpoints(run):
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM)[:times]:  # two of one number could be merged
        process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (0 if times == 1 else 130), error
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert "stopped by SIGINT at step" in last if times == 1 else last == "train.py: interrupted"
    assert read_state(list_checkpoints(run)[-1]).step >= 1 and not list(tmp_path.rglob("*.tmp"))
