"""Commands to type next are those of the way that the present one was typed."""

import shlex
import sys

import pytest
from helpers import ROOT, run_script

from flowmaps.cli import next_command


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (str(ROOT / "scripts/train.py"), f"python {shlex.quote(str(ROOT / 'scripts/prepare_data.py'))}"),
        ("scripts/train.py", "python scripts/prepare_data.py"),
        ("/usr/local/bin/flowmaps", "flowmaps prepare"),
        ("flowmaps train", "flowmaps prepare"),
        ("my/train.py", "flowmaps prepare"),
        ("", "flowmaps prepare"),
    ],
)
def test_the_command_is_written_as_the_present_one(monkeypatch, typed, shown):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [typed])
    assert next_command.command("prepare", "--out=my data") == f"{shown} '--out=my data'"


@pytest.mark.parametrize(
    ("data", "root", "flags"),
    [
        ("digits", "data", "--reference=digits:heldout"),
        ("cifar10", "/my/data", "--reference=cifar10:heldout --root=/my/data"),
        ("assets", "assets", "--reference=assets"),
        ("", "data", "--reference=FOLDER_OF_REAL_IMAGES"),
        ("faces", "data", "--reference=FOLDER_OF_REAL_IMAGES"),
    ],
)
def test_a_score_needs_a_reference(monkeypatch, data, root, flags):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["flowmaps"])
    euler = ["--sampler=euler", "--steps=32"]
    assert next_command.sampling("euler") == euler and not next_command.sampling("map")
    shown = next_command.fid("runs/a", data, euler, root)
    assert shown == f"flowmaps fid --checkpoint=runs/a {flags} --sampler=euler --steps=32 --num=2000"


@pytest.mark.slow
def test_what_a_chain_says_next_runs(tmp_path):
    smoke = ["--config=configs/digits.py:pipeline,smoke", f"--workdir={tmp_path}/run"]
    said = run_script("scripts/train.py", *smoke, check=True).stderr
    for stage in ("1/3 pre_training", "2/3 mid_training", "3/3 post_training"):
        assert f"stage {stage}\n" in said and f"{stage} 20/20 loss " in said
    commands = [line.removeprefix("next     ") for line in said.splitlines() if line.startswith("next ")]
    assert len(commands) == 2
    for command in commands:
        _, *words = shlex.split(command)
        words = [f"--out={tmp_path}/out" if word.startswith("--out=") else word for word in words]
        run_script(*[word.replace("--num=2000", "--num=80") for word in words], check=True)
