"""The lines of log.jsonl, and what a run shows on a terminal and in a file."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from contextlib import contextmanager

import pytest
import torch
from helpers.runs import tiny

from configs.digits import get_config as digits
from flowmaps.cli.run import _Terminal
from flowmaps.run_weights import list_checkpoints
from training.config import Optimizer, build_network
from training.log import Log, Progress, read_log
from training.loop import train
from training.optim import matrices


def test_numbers_that_json_lacks_are_null(tmp_path):
    log = Log(tmp_path, 1, 0)
    log.add({"loss": torch.tensor(float("inf")), "x": torch.tensor(float("nan"))})
    log.interval(1, 1, lr=1.0)
    log.score(1, "W2@1", float("inf"))
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] is rows[0]["x"] is rows[1]["W2@1"] is None and rows == read_log(tmp_path / "log.jsonl")


def test_another_number_of_threads_is_logged(tmp_path):
    threads = torch.get_num_threads()
    train(tiny(), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    torch.set_num_threads(threads + 1)
    try:
        train(tiny(), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert {"event": "threads", "step": 3, "before": threads, "now": threads + 1} in read_log(tmp_path / "log.jsonl")


VALUES = {"loss": 0.98765432, "images_per_second": 98765.4, "lr": 1e-4, "skipped": 0.0, "diagonal": 0.5}
LONG = (400_000, 399_990, "3/3 post_training")


@contextmanager
def terminal(monkeypatch):
    """A terminal of 80 columns as stderr, as commands have it; call it for what has been written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", _Terminal.around(stream))
        yield lambda: os.read(master, 1 << 16).decode()
    os.close(master)


@pytest.mark.parametrize(("steps", "start", "stage"), [(1500, 0, ""), LONG])
def test_the_bar_on_a_terminal_of_80_columns_is_readable(monkeypatch, steps, start, stage):
    with terminal(monkeypatch) as written:
        progress = Progress(steps, start, stage)
        progress.bar.start_t -= 40_000
        progress.bar.update(7)
        progress.show(start + 7, VALUES)
        progress.bar.close()
        last = written().rstrip().split("\r")[-1]
    assert len(last) <= 80 and last.startswith(f"{stage or 'step'} {start + 7}/{steps} ")
    assert "loss 0.9877 98,765 images/s" in last and re.search(r" 11:06:4\d<\d[\d:]+$", last)
    assert stage or len(last.split("|")[1]) >= 6  # left out where the rest needs its place


@pytest.mark.parametrize(("steps", "start", "stage"), [(1500, 0, ""), LONG])
def test_lines_of_a_log_file_have_the_time_left(capsys, steps, start, stage):
    progress = Progress(steps, start, stage)
    progress.begun -= 40_000
    for step in range(start + 1, start + 8):  # at once: the lines between are left out
        progress.show(step, VALUES)
    progress.show(steps, VALUES)
    first, last = (lines := capsys.readouterr().err.splitlines())
    assert first.startswith(f"{stage or 'step'} {start + 1}/{steps} loss 0.9877 98,765 images/s 11:06:40<")
    assert re.search(r"<00:00$" if stage else "<00:00 lr 0.0001$", last) and f" {steps}/{steps} " in last
    assert all(len(line) <= 80 and "\r" not in line for line in lines)


def test_what_a_run_says_at_its_start_and_end(tmp_path, capsys):
    train(tiny(), tmp_path)
    said = capsys.readouterr().err
    for part in ("checkerboard: 1,000,000 points of 2, no classes", "MLP, 7,490 parameters", "lagrangian, 6 steps of "):
        assert part in said
    assert "cpu, fp32, derivatives fp32\n" in said
    assert f"writes   {tmp_path}\n" in said and f"model    {tmp_path}/model\n" in said
    assert "muon" not in said
    train(tiny(), tmp_path)
    assert capsys.readouterr().err == f"complete already: {tmp_path}\n"
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(), tmp_path)
    assert f"writes   {tmp_path} (resumes at step 3)\n" in capsys.readouterr().err


def test_a_run_by_muon_says_how_much_it_trains(tmp_path, capsys):
    """Of a U-Net little: its kernels go to AdamW."""
    config = digits("lagrangian,smoke")
    config.steps, config.optim.name = 1, Optimizer.muon
    train(config, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("muon ")]
    network = build_network(config)
    share = sum(p.numel() for p in matrices(network).values()) / sum(p.numel() for p in network.parameters())
    assert line == f"muon     trains the matrices, {share:.0%} of the weights; adamw the rest" and len(line) <= 80
    assert 0.1 < share < 0.5
