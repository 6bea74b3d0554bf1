"""Run every command and code block of README, docs and CONTRIBUTING, in their order, in a copy of this repository.

A command runs unchanged except for the rules in SCALED, which make it take seconds: fewer steps and samples, networks
of a row's smoke variant, two processes instead of eight. Files that a user downloads are generated in real formats.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, image_sets, released, released_ect
from helpers.documents import blocks, commands, items
from helpers.makers import (
    encoded,
    photograph,
    write_data_root,
    write_folder,
    write_imagenet,
    write_inception,
    write_vae,
)
from helpers.released_maps import Map
from helpers.released_state_dicts import NCSNpp

from flowmaps.metrics.published import INCEPTION_FILE

PROGRAMS = r"(?:flowmaps|python|make|torchrun|accelerate|git|mkdir|for)\b"
SHORT = "--config.steps=20 --config.batch=16 --config.log_every=5 --config.checkpoint_every=5"
SCALED = {  # pattern -> replacement
    r"^flowmaps ": "python -m flowmaps ",
    r"--config=(\w+):": r"--config=configs/\1.py:",
    r"(configs/digits\.py:(?!pipeline)\w+)": rf"\1 {SHORT}",  # full width: the suites start from runs/digits-flow
    r"(configs/(?!digits\.py:(?!pipeline))\w+\.py:(?!\S*smoke)[\w,]+)": r"\1,smoke",
    r"(configs/imagenet\w+\.py:\S+)": r"\1 --config.network.num_classes=40",  # folders in `furnished`
    r"(best\.num|--num)=(?!32768)\d+": r"\1=40",  # except for points, which are cheap
    r"(scripts/fid\.py (?!.*--(?:num|from_record)).*)": r"\1 --num=40",  # instead of 50,000
    r"((?:scripts/train_extractor\.py|flowmaps extractor) .*)": r"\1 --epochs=1",
    r"--cpu_minutes=\d+": "--cpu_minutes=0.01",
    r"--seeds=0,1,2": "--seeds=0",
    r"--train_steps=\d+": "",
    r"--config\.steps=\d\d\d+": "--config.steps=20",
    r"(--suite=(?:checkerboard|digits|fashion_mnist|composition)\b.*--rows=\S*)": r"\1 --train_steps=4",
    r"(--suite=(?:learning|optimisers|mid_training|bellman|guidance)\b)": r"\1 --train_steps=8 --num=16",
    r"(--suite=steering\b)": r"\1 --seeds=0 --num=8",
    r"--suite=deployment --rows=fashion_mnist": "--suite=deployment --rows=digits --num=40",
    r"--suite=gate\b": "--suite=gate --train_steps=4 --num=100 --rows=digits",
    r"(examples/embeddings\.py \S+)": r"\1 4",
    r"(examples/enlarge\.py \S+ \S+)": r"\1 2 40",
    r"--rates=1e-3,3e-3,1e-2,3e-2": "--rates=1e-2",
    r"(--suite=(?:step|sample|networks|profile)\b)(?!.*--rows)": r"\1 --rows=UNet",
    r"--suite=step --rows=UNet": "--suite=step --rows=lagrangian",
    r"snapshot_every=\d+": "snapshot_every=4",
    r"best\.every=\d+": "best.every=10",
    r"--max_fid=[\d.]+": "--max_fid=9999",  # after 20 steps of training
    r"--steps=1,2,4 --sampler": "--steps=1 --sampler",  # each runs Inception
    r"--metrics=fid,kid,is,prc": r"\g<0> --kid_subset=20",
    r"--(nproc_per_node|num_processes|workers)=8": r"--\1=2",
    r"--multi_gpu": "--cpu",
    r"--nnodes=2(.*)HOST:29500": r"--nnodes=1\1localhost:29511",
    r"--workdir=/shared/": "--workdir=shared/",
    r" --config\.data\.download": "",  # tests run offline
    r"pytest -m slow": "pytest --collect-only -q -m slow",
    r"^make ": "make -n ",  # other tests run the demo and the tests
    r"git clone REPOSITORY flowmaps && cd flowmaps": f"git clone -q {ROOT} clone && cd clone",
    r"\), 128, 1024": "), 2, 256",
}
GIVEN = {  # names that a block expects its reader to have
    "docs/teachers.md": "my_denoiser = other_drift = lambda x, t, label: -x\n",
}
# Runs from which rows of configs start without naming them in the command.
UNNAMED = ["runs/digits-flow", "runs/digits"]


def scaled(text: str) -> str:
    for pattern, new in SCALED.items():
        text = re.sub(pattern, new, text)
    return text


PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "reference"]  # made by the site
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in DOCUMENTS}
COMMANDS = {name: commands(text) for name, text in TEXTS.items()}
BLOCKS = {name: blocks(text) for name, text in TEXTS.items()}
QUICK = ["README.md"]  # `make test` runs these documents, test-slow everything


class Copy:
    """A copy of the repository in which commands run as a user would type them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCH_HOME": str(folder / "torch"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.made: set[str] = set()

    def shell(self, command: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900
        )
        assert ran.returncode == 0, (
            f"{command}\nexited with {ran.returncode}:\n{ran.stdout[-1000:]}{ran.stderr[-3000:]}"
        )
        return ran.stdout

    def run(self, command: str) -> None:
        """Run a command of the documents, after the commands of the documents that make the directories it reads."""
        if command in self.made:
            return
        for name in re.findall(r"configs/(imagenet\d+)\.py", command):
            self.make(f"data/{name}")
        for path in re.findall(r"(?:checkpoint|teacher|init_from)=([\w-]+/[\w/-]+)", command):  # not a chain's stages
            self.make(path)
        for file in re.findall(r"--json=(assets/\S+)", command):
            (self.folder / file).unlink(missing_ok=True)  # existing records would not be run again
        self.shell(scaled(command))
        self.made.update(re.findall(r"--(?:workdir|out)=(\S+)", command))

    def follow(self, name: str) -> None:
        """Run the commands and blocks of a document in their order."""
        for kind, text in items(TEXTS[name]):
            if kind == "command":
                self.run(text)
            else:
                self.shell(f"python - <<'END'\n{GIVEN.get(name, '')}{scaled(text)}\nEND")

    def make(self, path: str) -> None:
        if path in self.made or (self.folder / path).exists():
            return
        for found in COMMANDS.values():
            for i, command in enumerate(found):
                if re.search(rf"--(workdir|out)={path}( |$)", command):
                    for unpacks in [c for c in found[:i] if re.match("mkdir|for", c)]:
                        self.run(unpacks)
                        self.made.add(unpacks)
                    return self.run(command)
        raise AssertionError(f"no command in the documents makes {path}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("documents"))


def write_images(folder: Path) -> None:
    write_folder(folder / "my/images", {f"{'ab'[i % 2]}/{i}.png": encoded(photograph(i), "png") for i in range(48)})


@pytest.fixture(scope="module")
def furnished(copy):
    """Add the files that users download or own: real formats, random contents."""
    folder = copy.folder
    write_data_root(folder / "data")
    write_images(folder)
    for split in ("train", "test"):
        image_sets.write_parquet(folder / "my/parquet", image_sets.pictures(48), split)
    image_sets.write_shards(folder / "my/shards", image_sets.pictures(48))
    (folder / "torch/hub/checkpoints").mkdir(parents=True)
    write_inception(folder / "inception.pth", size=299)
    os.link(folder / "inception.pth", folder / "torch/hub/checkpoints" / INCEPTION_FILE)
    for name in ("mse", "ema"):
        write_vae(folder / f"stabilityai/sd-vae-ft-{name}")
    shape = {"classes": 10, "size": 32, "mult": (1, 2, 2), "blocks": 1, "attention": (16,)}  # of from_edm,smoke
    released.edm("ddpm++", folder / "edm-cifar10-32x32-cond-vp.pkl", **shape)
    released_ect.ect(folder / "network-snapshot-latest.pkl")
    NCSNpp().save(folder / "checkpoint_10.pth")
    mirrored = folder / "mirror/zlab-princeton/SoFlow/B-4-cond"
    mirrored.mkdir(parents=True)
    for file in (folder / "SoFlow-B-4.pt", mirrored / "400000.pt"):
        Map("soflow", width=64, heads=1).save(file)
    write_vae(folder / "mirror/stabilityai/sd-vae-ft-mse")
    tree = write_imagenet(folder / "imagenet", classes=40)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in sorted(tree.iterdir()):
            with tarfile.open(folder / "part.tar", "w") as part:
                for image in sorted(synset.iterdir()):
                    part.add(image, image.name)
            archive.add(folder / "part.tar", f"{synset.name}.tar")
    pictures = np.stack([np.asarray(photograph(i, 256, 256)) for i in range(8)])
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=pictures, **moments)
    np.savez(folder / "mirror/VIRTUAL_imagenet256_labeled.npz", **moments)
    for path in UNNAMED:
        copy.make(path)
    return copy


def test_every_indented_line_is_a_command():
    for name, found in COMMANDS.items():
        assert all(re.match(PROGRAMS, command) for command in found), name
    assert sum(map(len, COMMANDS.values())) > 80 and sum(map(len, BLOCKS.values())) >= 7


def test_every_example_is_short_and_runs():
    """In a document, or in a test: the server does not end, and the emoji need Debian's font."""
    named = {name for found in COMMANDS.values() for c in found for name in re.findall(r"examples/(\w+\.py)", c)}
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file
        assert file.name in named | {"server.py", "emoji.py"}, file


@pytest.mark.slow
def test_the_example_of_emoji_fills_a_folder(copy):
    if not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").exists():
        pytest.skip("needs fonts-noto-color-emoji and unicode-data of Debian")
    made = copy.shell("python examples/emoji.py emoji")
    assert "3045 pictures in emoji 350 pictures in emoji-heldout" in made


def test_each_rule_changes_some_line():
    """A rule that matches nothing is left over from a removed command."""
    lines = [line for found in (*COMMANDS.values(), *BLOCKS.values()) for line in found]
    for pattern, new in SCALED.items():
        changed = [re.sub(pattern, new, line) for line in lines]
        assert changed != lines, pattern
        lines = changed


@pytest.mark.parametrize("name", QUICK)
def test_the_first_page_runs(copy, name):
    write_images(copy.folder)
    copy.follow(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTS if name not in QUICK and items(TEXTS[name])])
def test_all_commands_and_blocks_run(furnished, name):
    if name == "docs/extending.md":
        extend(furnished.folder)
    furnished.follow(name)


def extend(folder: Path) -> None:
    """Follow extending.md in the copy: add the file, and the row in the table."""
    objectives = folder / "flowmaps" / "objectives"
    (objectives / "thirds.py").write_text(BLOCKS["docs/extending.md"][0])
    table = (objectives / "__init__.py").read_text()
    row = "OBJECTIVES: dict[str, type[Objective]] = {\n"
    assert row in table
    table = table.replace(row, f'from flowmaps.objectives.thirds import Thirds\n\n{row}    "thirds": Thirds,\n')
    (objectives / "__init__.py").write_text(table)
