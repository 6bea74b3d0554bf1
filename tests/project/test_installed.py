"""The wheel as a user has it: installed, in a folder with its own training/, samplers/ and configs/."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.documents import items
from PIL import Image

from flowmaps.data import iterate, open_dataset

TRAIN = (
    "train --config.steps=5 --config=folder:lagrangian,smoke --config.data.root=pictures --config.network.channels=1"
)
TRAIN += " --config.network.image_size=8 --config.network.attention_resolutions=4 --config.network.num_classes=10"
COMMANDS = [
    f"{TRAIN} --config.data.workers=1 --workdir=runs/mine",
    "sample --checkpoint=runs/mine --steps=1,2 --num=10 --out=samples",
    "fid --checkpoint=runs/mine --reference=pictures --extractor=digits --steps=1 --num=300 --json=fid.json",
    "schedule --checkpoint=runs/mine --steps=2 --noises=4 --fine=4 --out=schedule.json",
    "stats --data=pictures --extractor=digits --out=pictures.npz",
    "export --checkpoint=runs/mine --out=exported --results=fid.json",
    "prepare imagenet --src=pictures --size=8 --out=prepared",
    "sample --checkpoint=digits --steps=1 --num=10 --out=shipped",
    "train --config=my.py:any --workdir=runs/my --config.steps=5",
]
WRITTEN = "runs/mine/model samples/grid.png fid.json schedule.json pictures.npz exported/README.md shipped/grid.png"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the environment and the folder of a user who installed the wheel."""
    base = tmp_path_factory.mktemp("installed")
    for command in (
        ["hatchling", "build", "-t", "wheel", "-d", f"{base}/dist"],
        [
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--find-links",
            f"{base}/dist",
            "-t",
            f"{base}/site",
            "flowmaps",
        ],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    home = base / "home"
    for name in ("training", "samplers", "configs"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text(f"raise ImportError('the {name} of the current folder')")
    for x, labels in iterate(open_dataset("digits", "heldout")):
        for i, (image, label) in enumerate(zip(x, labels, strict=True)):
            folder = home / "pictures" / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{len(list(folder.iterdir()))}-{i}.png")
    (home / "my.py").write_text("from flowmaps.configs.checkerboard import get_config as shipped\nimport other\n")
    with (home / "my.py").open("a") as file:
        file.write("def get_config(row):\n    return shipped(other.ROW)\n")
    (home / "other.py").write_text("ROW = 'lagrangian,smoke'\n")
    paths = f".:{base}/site"  # an empty or relative entry puts the current folder first
    return home, os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home)}


def call(installed, program: list[str], arguments: str) -> str:
    home, environment = installed
    command = [*program, *arguments.split()]
    ran = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"{arguments}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


@pytest.mark.slow
def test_every_command_works_from_a_folder_with_packages_of_our_names(installed):
    home, _ = installed
    program = [str(home.parent / "site" / "bin" / "flowmaps")]
    where = call(installed, [sys.executable, "-c", "import flowmaps; print(flowmaps.__file__)"], "")
    assert Path(where.strip()).is_relative_to(home.parent / "site")
    for command in COMMANDS:
        call(installed, program, command)
    assert all((home / name).exists() for name in WRITTEN.split())


SMALLER = {  # pattern -> replacement: what makes the training of a tutorial take seconds
    r"(folder:\w+,small)": r"\1,smoke",
    r"--config\.steps=\d+": "--config.steps=20",
    r"--num=3000": "--num=200",
    r"(flowmaps extractor .*)": r"\1 --epochs=1",
}
PRINTED = {  # by tutorial, what its commands print
    "own_images": ["FD-pictures"],
    "gate": ["no significant worsening: passed", "significantly worse (tolerance=0): failed\nexit code 1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_tutorials_run_from_an_empty_folder(installed, tmp_path, name):
    """The commands and blocks of a tutorial, in their order, with the wheel alone."""
    home, environment = installed
    paths = {"PATH": f"{home.parent}/site/bin:{Path(sys.executable).parent}:{environment['PATH']}"}
    paths["PYTHONPATH"] = f"{home.parent}/site"
    shown = ""
    for kind, text in items((ROOT / "docs/tutorials" / f"{name}.md").read_text()):
        for pattern, new in SMALLER.items():
            text = re.sub(pattern, new, text)
        command = ["bash", "-c", text] if kind == "command" else [sys.executable, "-c", text]
        ran = subprocess.run(command, cwd=tmp_path, env=environment | paths, capture_output=True, text=True)
        assert ran.returncode == 0, f"{text}\n{ran.stdout}{ran.stderr}"
        shown += ran.stdout
    assert all(text in shown for text in PRINTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_data_workers_start_by_every_method(installed, method):
    """macOS spawns workers, and newer Pythons have a fork server: they must find the installed packages too."""
    home, _ = installed
    (home / "start.py").write_text(
        "import multiprocessing, sys\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv.pop(1))\n"
        "    from flowmaps.cli.commands import main\n    main()\n"
    )
    arguments = (
        f"train --config=digits:lagrangian,smoke --config.steps=3 --config.data.workers=1 --workdir=runs/{method}"
    )
    call(installed, [sys.executable, "start.py", method], arguments)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run --nproc_per_node=2", "accelerate.commands.launch --cpu"])
def test_launchers_run_the_module(installed, launcher):
    """`torchrun -m flowmaps` and `accelerate launch -m flowmaps` put the current folder first in sys.path."""
    home, _ = installed
    name = launcher.split(".")[0]
    arguments = f"-m {launcher} -m flowmaps train --config=checkerboard:lagrangian,smoke --config.steps=5"
    call(installed, [sys.executable], f"{arguments} --workdir=runs/{name}")
    assert (home / "runs" / name / "model").is_dir()
