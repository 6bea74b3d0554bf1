"""The command `flowmaps` from any folder: names of commands and configs, and folders that are called like ours."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, Done

from flowmaps.cli.commands import COMMANDS
from flowmaps.cli.run import as_typed
from training.cli.config_file import _config_first, _split

CONFIG = """import mybase

def get_config(row=""):
    return mybase.make()
"""
NEIGHBOUR = """from flowmaps.configs.checkerboard import get_config

def make():
    return get_config("lagrangian,smoke")
"""


WRITTEN = {  # in a message -> for those who called `flowmaps`
    "python scripts/prepare_data.py latents": "flowmaps prepare latents",
    "run scripts/prepare_data.py images again": "run flowmaps prepare images again",
    "(stats.py --features)": "(flowmaps stats --features)",
    "sample.py, fid.py and": "flowmaps sample, flowmaps fid and",
    "my/train.py and --config=train.py and benchmark.py": "my/train.py and --config=train.py and benchmark.py",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_texts_name_scripts_as_they_were_called(text):
    assert as_typed(text, "flowmaps fid") == WRITTEN[text] and as_typed(text, "fid.py") == text


@pytest.fixture
def elsewhere(tmp_path):
    """A folder whose own training, samplers and configs would break the command if it imported them."""
    for name in ("training", "samplers", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the {name} of the current folder')")
    return tmp_path


def flowmaps(folder, *arguments, pythonpath=str(ROOT)):
    environment = os.environ | {"PYTHONPATH": pythonpath, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flowmaps", *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return Done(ran.returncode, ran.stdout, ran.stderr)


def test_help_lists_every_command_in_one_line_from_any_folder(elsewhere):
    shown = flowmaps(elsewhere, "--help", pythonpath=f".:{ROOT}").stdout.splitlines()
    assert [line.split()[0] for line in shown if line.startswith("  ")] == list(COMMANDS)
    assert all(len(line.split()) > 4 and len(line) <= 100 for line in shown if line.startswith("  "))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_it_as_it_was_called(name, elsewhere):
    done = flowmaps(elsewhere, name, "--help", pythonpath=f".:{ROOT}")
    assert f"flowmaps {name} " in done.stdout and not re.search(r"scripts/|configs/|\w\.py\b", done.stdout)


MISTAKES = {
    (): "flowmaps: error: missing command: choose one of train, ",
    ("trian",): "flowmaps: error: unknown command 'trian': did you mean train? choose one of train, ",
    ("fid", "--sampels=x"): "flowmaps fid: error: --sampels: unknown flag: did you mean --samples?",
    (
        "prepare",
        "latent",
    ): "flowmaps prepare: error: unknown sub-command 'latent': did you mean latents? choose one of ",
    ("train", "--config.steps=8"): "flowmaps train: error: --config.steps: needs --config, whose field it is",
    ("train", "--config=fodler:small"): "no such config: did you mean folder? give a file, or one of checkerboard, ",
    ("train", "--config=configs/digits.py:lagrangian"): "no such config: did you mean digits? give a file",
    ("train", "--config=digits:lagrangain"): "unknown row 'lagrangain': did you mean lagrangian? choose one of flow_m",
    ("train", "--config=digits:smoke"): "'smoke' is a variant: name a row before it",
    ("train", "--config=digits:lagrangian,smok"): "unknown variant 'smok': did you mean smoke? choose one of smoke",
    ("sample", "--checkpoint=nothing", "--out=o"): "no directory nothing",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line_with_the_name_that_was_meant(arguments, elsewhere):
    done = flowmaps(elsewhere, *arguments)
    assert done.returncode == 2 and MISTAKES[arguments] in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_config_imports_its_neighbour_and_a_shipped_config_and_its_flags_come_in_any_order(elsewhere):
    (elsewhere / "my").mkdir()
    (elsewhere / "my" / "config.py").write_text(CONFIG)
    (elsewhere / "my" / "mybase.py").write_text(NEIGHBOUR)
    (elsewhere / "flags").write_text("--config.network.width=24\n--config=my/config.py\n")
    done = flowmaps(elsewhere, "train", "--config.batch=8", "--dry_run", "--flagfile=flags", pythonpath=f".:{ROOT}")
    assert done.returncode == 0 and "loss of two steps" in done.stdout, done.stderr


def test_sample_has_a_checkpoint_without_a_checkout(elsewhere):
    done = flowmaps(elsewhere, "sample", "--checkpoint=digits", "--steps=1", "--num=2", "--out=out")
    assert done.returncode == 0 and (elsewhere / "out" / "grid.png").is_file(), done.stderr


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["--config.a=1", "--config=x", "--b=2"], ["--config=x", "--config.a=1", "--b=2"]),
        (["--config.a", "1", "-config", "x", "c"], ["-config", "x", "--config.a", "1", "c"]),
        (["--config.a=1", "--", "--config=x"], ["--config.a=1", "--", "--config=x"]),
        (["--b=2", "--config"], ["--config", "--b=2"]),
        (["--configs=1"], ["--configs=1"]),
    ],
)
def test_config_comes_before_its_fields(given, ordered):
    assert _config_first(given) == ordered


def test_a_file_goes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _split("digits:lagrangian") == (ROOT / "configs" / "digits.py", ["lagrangian"])
    assert _split("digits") == (ROOT / "configs" / "digits.py", [])
    (tmp_path / "digits").mkdir()
    assert _split("digits:lagrangian")[0] == ROOT / "configs" / "digits.py"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("")
    assert str(_split("digits:lagrangian")[0]) == "digits"
