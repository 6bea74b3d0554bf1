"""The lines of log.jsonl, and what a run shows on a terminal and in a file."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import sys
import termios
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.runs import tiny
from PIL import Image

from configs.digits import get_config as digits
from flowmaps import UserError
from flowmaps.cli.run import _Terminal
from flowmaps.run_weights import list_checkpoints
from training.config import Optimizer, build_network
from training.config_sections import TRACKERS
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


def read_all(terminal):
    """Read what a terminal has got; under load the system hands it over in parts."""
    text = b""
    while select.select([terminal], [], [], 0.5)[0]:
        text += os.read(terminal, 1 << 16)
    return text.decode()


@contextmanager
def terminal(monkeypatch):
    """A terminal of 80 columns as stderr, as commands have it; call it for what has been written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", _Terminal.around(stream))
        yield lambda: read_all(master)
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


def records(content, block=1 << 15):
    """Yield the records of W&B's file, a log of LevelDB: blocks of chunks (checksum, length, kind) after 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # too little room for a chunk
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the complete record, or its last chunk
            yield whole
            whole = b""


def offline_runs(workdir):
    """Return the rows and the config that each offline run of W&B holds, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
        rows, config = [], {}
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            rows += [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}]
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            config |= {i.key: json.loads(i.value_json) for i in record.config.update}
        found.append(([row for row in rows if row], config, file.name))
    return found


@pytest.fixture
def offline(monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)


def test_wandb_offline_and_tensorboard_hold_the_scalars_of_the_log(tmp_path, offline):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(log_with=("wandb", "tensorboard")), tmp_path)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    ((rows, config, _),) = offline_runs(tmp_path)
    logged = [row for row in read_log(tmp_path / "log.jsonl") if row.get("loss")]
    assert [row["step"] for row in logged] == [2, 4, 6]
    for name in ("loss", "diagonal", "lr", "images_per_second"):
        wanted = {row["step"]: row[name] for row in logged}
        assert {row["_step"]: row[name] for row in rows if name in row} == pytest.approx(wanted)
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted, rel=1e-6)
    assert config["optim.lr"] == tiny().optim.lr and config["data.name"] == "checkerboard"
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    (shown,), (grid,) = events.Images("samples"), (tmp_path / "samples").iterdir()
    for file in (picture, io.BytesIO(shown.encoded_image_string)):
        assert np.array_equal(np.asarray(Image.open(file).convert("L")), np.asarray(Image.open(grid)))


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, offline):
    train(tiny(log_with=("wandb",)), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(log_with=("wandb",)), tmp_path)
    (_, _, first), (rows, _, second) = offline_runs(tmp_path)
    assert first == second and min(row["_step"] for row in rows if "loss" in row) > 3


class Failing:
    """A tracker that raises in the method ``at``."""

    requires_logging_directory, at = False, ""

    def __init__(self, name, **options):
        pass

    def __getattr__(self, name):
        def method(*arguments, **options):
            if name == self.at:
                raise OSError("no route to host")

        return method


@pytest.mark.parametrize("at", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_a_failing_tracker_is_one_line_and_stops_nothing(tmp_path, at, monkeypatch, capsys):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", type("Broken", (Failing,), {"at": at}))
    train(tiny(), tmp_path / "a")
    capsys.readouterr()
    train(tiny(log_with=("mlflow",)), tmp_path / "b")
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: mlflow fails and is left out from here on: OSError: no route to host"]
    assert (tmp_path / "b" / "tb").is_dir()
    steps = [[row["step"] for row in read_log(tmp_path / run / "log.jsonl")] for run in "ab"]
    assert steps[0] == steps[1] and steps[0][-1] == 6


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tiny(log_with=("wandb",)), tmp_path)
    assert "warning: wandb fails and is left out from here on: ModuleNotFoundError: " in capsys.readouterr().err


def test_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == {str(name) for name in LOGGER_TYPE_TO_CLASS}
    with pytest.raises(UserError, match=r"log_with=wandv: did you mean wandb\?"):
        tiny(log_with=("wandv",)).validate()
