"""Robustness of a run: locks, full disks, dead workers, gradient spikes, old configs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run_script
from helpers.runs import assert_same, tiny, weights

from flowmaps import UserError
from flowmaps.data import Loader, open_images
from flowmaps.data.shards import PreparedImages
from flowmaps.run_weights import list_checkpoints
from training.loop import train
from training.optim import WINDOW, Spikes
from training.run_directory import run_lock
from training.trainer import Trainer


def held_lock(directory, ready, done):
    with run_lock(directory):
        ready.set()
        done.wait(60)


def test_two_runs_do_not_share_a_directory(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=held_lock, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"^workdir={tmp_path}: process {other.pid} on .* trains there"):
        train(tiny(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
    other.kill()  # and no lock stays behind
    other.join()
    train(tiny(), tmp_path)


ROW = "--config=configs/digits.py:lagrangian,smoke --config.optim.decay=constant"
TRAIN = f"{sys.executable} scripts/train.py {ROW} --workdir="


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="no file system can be mounted here",
)
@pytest.mark.parametrize("way", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_a_full_or_read_only_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(tmp_path, way):
    """A real file system with room for one checkpoint, or read-only; made writable, the same command ends as usual."""
    size, disk = {"full": "6m", "read-only": "9m"}[way], tmp_path / "disk"
    disk.mkdir()
    run = f"{TRAIN}{disk}/run --config.keep=9"
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {disk}
        {run if way == "full" else f"{run} --config.steps=10 && mount -o remount,ro {disk} && {run}"}
        echo "exit $?"
        ls {disk}/run/checkpoints
        mount -o remount,size=99m,rw {disk}
        {run}
        echo "exit $?"
        cp -r {disk}/run {tmp_path}/kept
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert re.findall(r"exit (\d+)", ran.stdout) == ["2", "0"], ran.stderr
    errors = [line for line in ran.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[way]
    assert len(errors) == 1 and f"--workdir={disk}/run" in errors[0] and reason in errors[0], ran.stderr
    assert "step-00000005" in ran.stdout and "tmp" not in ran.stdout
    run_script(*TRAIN.split()[1:-1], f"--workdir={tmp_path}/whole", "--config.keep=9", check=True)
    assert_same(weights(tmp_path / "kept"), weights(tmp_path / "whole"))


def test_a_dead_worker_is_named_with_the_file_it_held(data_root, tmp_path, monkeypatch):
    """The system kills it while it reads, as it does when memory runs out."""
    shutil.copytree(data_root / "folder", tmp_path / "folder")
    data = open_images(tmp_path / "folder", size=8)
    image = type(data)._image

    def deadly(self, name):
        if name == "a/4.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return image(self, name)

    monkeypatch.setattr(type(data), "_image", deadly)
    loader = Loader(data, lambda k: torch.arange(12), workers=2)
    with pytest.raises(UserError, match=r"worker ended at .*/folder/a/4\.png ") as caught, loader.watched():
        loader.batch(0)
    assert "\n" not in str(caught.value) and "workers=2" in str(caught.value)


def test_files_of_shards(imagenet_root):
    data = PreparedImages.open(imagenet_root / "imagenet64")
    assert data.file_of(0).endswith("imagenet64/shard-00000.safetensors")
    assert data.file_of(len(data) - 1).endswith(f"shard-{len(data.ends) - 1:05d}.safetensors")


def test_a_spike_is_far_above_the_median_of_the_window():
    spikes = Spikes()
    assert not any(spikes.is_spike(norm, 5) for norm in [*range(1, WINDOW), 1e9])  # none before the window is full
    assert not spikes.is_spike(300, 5) and spikes.is_spike(400, 5)  # the median is 65
    assert not spikes.is_spike(1e9, 0)
    found = [spikes.is_spike(1000, 5) for _ in range(WINDOW)]
    assert found[0] and not found[-1] and spikes.count == 1 + sum(found)  # a lasting change becomes normal


def test_a_spike_changes_no_weight_and_is_known_after_a_resume(tmp_path, monkeypatch):
    config = tiny()
    config.optim.spike = 3.0
    trainer = Trainer.build(config)
    trainer.spikes = Spikes([1e-9] * WINDOW)
    before = {k: v.clone() for k, v in trainer.module.state_dict().items()}
    trainer.step(0)
    assert_same(before, trainer.module.state_dict())
    assert trainer.spikes.count == 1 and trainer.skipped == 0
    monkeypatch.setattr("training.optim.WINDOW", 3)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    train(config, tmp_path / "parts")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    states = [json.loads((list_checkpoints(tmp_path / d)[-1] / "state.json").read_text()) for d in ("whole", "parts")]
    assert states[0] == states[1] and len(states[0]["norms"]) == 3


def test_a_run_from_before_a_field_existed_resumes_with_its_default(tmp_path):
    train(tiny(), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optim"]["spike"], stored["shard"], stored["network"]["depth"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"^config\.network\.depth: differs"):
        train(tiny(), tmp_path)  # the row's is not the default
    stored["network"]["depth"] = tiny().network.depth
    (tmp_path / "config.json").write_text(json.dumps(stored))
    train(tiny(), tmp_path)
    config = tiny()
    config.optim.spike = 5.0
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"^config\.optim\.spike: differs"):
        train(config, tmp_path)


def test_another_number_of_shards_is_logged(tmp_path):
    train(tiny(), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(accumulate=2), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"event": "shards", "step": 3, "before": 1, "now": 2} in rows
