"""Robustness of a run: locks, full disks, dead workers, gradient spikes, old configs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_script
from helpers.runs import assert_same, tiny, weights

from flowmaps import UserError
from flowmaps.data import Loader, open_images
from flowmaps.data.shards import PreparedImages
from flowmaps.files import to_json, write_json
from flowmaps.objectives import MeanFlow
from flowmaps.objectives.time_sampling import DiagonalDraw
from flowmaps.run_weights import list_checkpoints
from training.log import read_log
from training.loop import train
from training.optim import WINDOW, Spikes
from training.run_directory import check_same_config, prune_checkpoints, run_lock
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
@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "read-only"])
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


def test_a_run_from_before_the_laws_changed_goes_on_by_the_old_ones_or_is_refused(tmp_path):
    config = tiny()
    config.objective = MeanFlow(diagonal=0.5)
    write_json(tmp_path / "config.json", config.to_dict())
    check_same_config(config, tmp_path / "config.json")
    stored = config.to_dict()
    for name in ("diagonal_draw", "guidance_mix", "guidance_power", "adaptive_floor"):
        del stored["objective"][name]
    write_json(tmp_path / "config.json", stored)
    with pytest.raises(UserError, match=r"diagonal_draw|guidance_mix|guidance_power"):
        check_same_config(config, tmp_path / "config.json")
    config.objective = MeanFlow(
        diagonal=0.5, diagonal_draw=DiagonalDraw.single, guidance_mix=0.0, guidance_power=0.0, adaptive_floor=1e-3
    )
    check_same_config(config, tmp_path / "config.json")
    stored["objective"]["times"] = "gap"
    write_json(tmp_path / "config.json", stored)
    with pytest.raises(UserError, match=r"objective\.times=gap: draws other times"):
        check_same_config(tiny(), tmp_path / "config.json")


def test_another_number_of_shards_is_logged(tmp_path):
    train(tiny(), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(accumulate=2), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"event": "shards", "step": 3, "before": 1, "now": 2} in rows


PLANTED = {  # what a user may have under the names that a run writes
    "config.json": '{"mine": 1}',
    "log.jsonl": "mine",
    "model/notes.txt": "mine",
    "samples/step-00000006.png": "mine",
    "checkpoints/step-00000001/state.json": '{"mine": 1}',
    "checkpoints/best/mine.txt": "mine",
    "snapshots/step-00000001.safetensors": "mine",
    "tb/events": "mine",
    ".lock": "mine",
}


def content(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", PLANTED)
def test_a_directory_that_is_not_a_run_is_refused_before_any_work_and_nothing_changes(tmp_path, name, monkeypatch):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(PLANTED[name])
    before = content(tmp_path)
    monkeypatch.setattr(Trainer, "build", None)  # no work
    with pytest.raises(UserError, match=re.escape(name.partition("/")[0])) as caught:
        train(tiny(), tmp_path)
    assert caught.value.field == "workdir" and content(tmp_path) == before


@pytest.mark.parametrize("name", [".lock", "config.json", "log.jsonl", "model", "samples", "checkpoints", "tb"])
@pytest.mark.parametrize("finished", [False, True], ids=["new", "run"])
def test_a_directory_in_place_of_a_file_and_the_reverse_are_refused_by_name(tmp_path, name, finished):
    path = tmp_path / name
    if finished:
        (tmp_path / "config.json").write_bytes(to_json({"steps": 1}))
        path.unlink(missing_ok=True)
    path.mkdir() if "." in name else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is not a (file|directory)"):
        train(tiny(), tmp_path)


def test_a_run_replaces_its_own_files_and_keeps_those_of_the_user(tmp_path):
    """After the loss of all checkpoints it starts anew; prunes and stale deletions leave what no run wrote."""
    config = tiny(ema=(0.9999,), ema_widths=(0.05, 0.1), snapshot_every=3, steps=6, keep=1)
    train(config, tmp_path)
    mine = [tmp_path / "snapshots/mine.safetensors", tmp_path / "notes.txt", tmp_path / "samples/mine.png"]
    mine += [list_checkpoints(tmp_path)[-1] / "mine.txt", list_checkpoints(tmp_path)[-1] / "mine.safetensors"]
    for file in mine:
        file.write_text("mine")
    for file in ("state.json", "network.safetensors"):
        (list_checkpoints(tmp_path)[-1] / file).unlink()
    (tmp_path / "checkpoints/step-00000006").rename(tmp_path / "checkpoints/kept")
    mine = [Path(str(file).replace("step-00000006", "kept")) for file in mine]
    train(config, tmp_path)
    assert all(file.read_text() == "mine" for file in mine)
    note = list_checkpoints(tmp_path)[0] / "note.txt"
    note.write_text("mine")
    shutil.copytree(list_checkpoints(tmp_path)[-1], tmp_path / "checkpoints/step-00000009")
    prune_checkpoints(tmp_path, 1)
    assert note.read_text() == "mine" and len(list_checkpoints(tmp_path)) == 2
    note.unlink()
    prune_checkpoints(tmp_path, 1)
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_run_from_before_files_were_marked_resumes(tmp_path):
    train(tiny(), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("written_by") == "flowmaps"
    (tmp_path / "config.json").write_text(json.dumps(stored, indent=2))
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": NaN, "x": -Infinity}\n{"step": 4}\n{"step": 5, "lo')
    train(tiny(), tmp_path)
    assert read_log(tmp_path / "log.jsonl")[0] == {"step": 2, "loss": None, "x": None}
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("log.jsonl", '{"step": 2}\n5\n', r"log\.jsonl, line 2 is 5"),
        ("log.jsonl", '{"loss": 2}\n', r"log\.jsonl, line 1: step is None"),
        ("log.jsonl", '{"step": 1, "a": [1]}\n', r"log\.jsonl, line 1: a is"),
        ("log.jsonl", "[" * 9999 + "\n", r"log\.jsonl, line 1 is not readable JSON \(too deeply nested"),
        ("log.jsonl", '{"step": ' + "9" * 9999 + "}\n", r"log\.jsonl, line 1 is not readable JSON"),
        ("config.json", "[1]", r"config\.json is \[1\], expected dict"),
        ("config.json", '{"origin": [1]}', r"config\.json: origin is"),
        ("config.json", '{"optim": 3}', r"differs from the run"),
        ("config.json", "", r"config\.json is not readable JSON"),
        ("state.json", "null", r"state\.json"),
        ("state.json", '{"norms": "x"}', r"state\.json: norms is 'x'.*: delete .*step-00000003"),
        ("state.json", '{"shards": "x"}', r"state\.json: shards is 'x'"),
        ("state.json", '{"teacher": 3}', r"state\.json: teacher is 3"),
    ],
)
def test_a_damaged_file_of_a_run_is_refused_by_name(tmp_path, file, text, said):
    train(tiny(), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    path = tmp_path / file if file != "state.json" else list_checkpoints(tmp_path)[-1] / file
    if text.startswith('{"') and file == "state.json":
        text = json.dumps({**json.loads(path.read_text()), **json.loads(text)})
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        train(tiny(), tmp_path)
