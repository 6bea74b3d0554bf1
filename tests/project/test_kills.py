"""Every command, killed before any of its file operations, leaves what was there or what was to be there, usable."""

import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from helpers import ROOT
from helpers.fuzz import Server, tree
from helpers.makers import encoded, photograph, write_folder
from helpers.released import edm
from PIL import Image
from safetensors import safe_open

from flowmaps import FlowMap
from flowmaps.evaluation.gate import read_record
from flowmaps.metrics import FeatureStats
from samplers import Schedule

pytestmark = pytest.mark.slow
POINTS = 40  # operations at most at which a command is killed, evenly spread
REFERENCE = str(ROOT / "assets/references/digits.npz")


def model(path):
    FlowMap.from_pretrained(path)


def picture(path):
    Image.open(path).load()


def arrays(path):
    with np.load(path) as found:
        assert len(found["arr_0"]) and all(len(found[name]) >= 0 for name in found.files if found[name].ndim)


def pictures(path):
    for file in path.iterdir():
        picture(file)


SAMPLE = "--checkpoint=assets/digits --steps=1,2 --num=6 --out={out} --seed={seed}"
FID = "--checkpoint=assets/digits --steps=1 --num=70 --json={out}/r.json --junit={out}/r.xml --seed={seed}"
SCHEDULE = "--checkpoint={out}/model --steps=2 --noises=4 --fine=4 --seed={seed}"
TRAIN = "--config=configs/digits.py:lagrangian,smoke --config.batch=8 --config.log_every=1 --config.checkpoint_every=2"
COMMANDS = {  # script: module, arguments, and per output how it is read, as a pattern of paths
    "sample": ("flowmaps.cli.sample", SAMPLE, {"grid.png": picture, "samples-*.npz": arrays, "steps-*": pictures}),
    "fid": (
        "flowmaps.cli.fid",
        f"{FID} --reference={REFERENCE}",
        {"r.json": read_record, "r.xml": ET.parse},
    ),
    "stats": ("flowmaps.cli.stats", "--data=digits:heldout --out={out}/s.npz", {"s.npz": FeatureStats.load}),
    "schedule": (
        "flowmaps.cli.schedule",
        SCHEDULE + " --out={out}/s.json --plot={out}/s.png --store",
        {"s.json": lambda path: Schedule.from_json(path.read_text()), "s.png": picture, "model": model},
    ),
    "export": ("flowmaps.cli.export", "--checkpoint=assets/checkerboard --out={out}/model", {"model": model}),
    "import": ("flowmaps.cli.import_checkpoint", "--format=edm --src={out}/edm.pkl --out={out}/new", {"new": model}),
    "trajectories": (
        "training.cli.prepare",
        "trajectories --teacher=assets/digits --num=6 --shard=2 --steps=2 --out={out}/set",
        {},
    ),
    "images": ("training.cli.prepare", "imagenet --src={out}/source --size=8 --shard=2 --out={out}/set", {}),
    "train": (
        "training.cli.train",
        TRAIN + " --config.steps=4 --config.ema_widths=(0.05,0.1) --config.snapshot_every=2 --workdir={out}/run",
        {"run/model": model, "run/samples/*.png": picture},
    ),
}


def prepared(name, out):
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    if name == "schedule":
        shutil.copytree(ROOT / "assets/digits", out / "model")
    elif name == "import":
        edm("ddpm++", out / "edm.pkl")
    elif name == "images":
        write_folder(out / "source", {f"{c}/{i}.png": encoded(photograph(i), "png") for c in "ab" for i in range(3)})


def check(out, readers):
    """Read every output that is there."""
    for pattern, read in readers.items():
        for path in out.glob(pattern):
            read(path)
    assert (out / "mine.txt").read_text() == "mine"


def content(out):
    """Return what two complete calls must agree in; times and speeds differ."""
    varying = ("tb/", "log.jsonl", ".lock")
    found = {name: digest for name, digest in tree(out).items() if not any(part in name for part in varying)}
    for path in out.rglob("snapshots/*.safetensors"):  # whose metadata are in any order
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}
            found[str(path.relative_to(out))] = str((sorted(file.metadata().items()), tensors))
    return found


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "again"])
def test_a_kill_before_any_file_operation(name, earlier, tmp_path):
    """``again``: over the output of an earlier call."""
    module, good, readers = COMMANDS[name]
    if earlier and name in ("trajectories", "images", "train"):
        pytest.skip("a second call has nothing to do there")
    (tmp_path / "current").mkdir()
    server = Server(module, f"{name}.py", tmp_path / "current")
    out, made = tmp_path / "out", tmp_path / "made"
    prepared(name, made)

    def call(seed, at=None):
        return server.dying(good.format(out=out, seed=seed).split(), at)

    def start():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)  # with the times of its files
        if earlier:
            assert call(0)[0] in (0, 1)

    try:
        start()
        call(1)  # which compiles modules, and fills caches outside of the folder
        start()
        code, operations = call(1)
        assert code in (0, 1) and operations
        check(out, readers)
        expected = content(out)
        step = max(1, operations // POINTS)
        for at in range(1, operations + 1, step):
            start()
            code, _ = call(1, at)
            assert code == 99
            check(out, readers)
            assert call(1)[0] in (0, 1)
            check(out, readers)
            assert content(out) == expected, at
        print(f"{name}: killed at {len(range(1, operations + 1, step))} of {operations} operations")
    finally:
        server.close()
