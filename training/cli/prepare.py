"""Prepare data for training, once: files that a run reads instead of making them at each step.

python scripts/prepare_data.py imagenet --src=ILSVRC/Data/CLS-LOC/train --size=64 --out=data/imagenet64 --workers=8
python scripts/prepare_data.py latents --src=ILSVRC/Data/CLS-LOC/train --size=256 --vae=stabilityai/sd-vae-ft-ema \\
    --flip --out=data/imagenet256 --workers=8
python scripts/prepare_data.py trajectories --teacher=runs/digits-flow --out=data/walks --num=8192
python scripts/prepare_data.py trajectories --teacher=teachers/edm --out=data/walks --num=50000 \\
    --solver=dpm_solver --grid=log_snr --low=0.0062 --start=data --data=cifar10

imagenet: a folder or zip of images in one folder a class, cropped as ADM does it, for --config.data.name=prepared.
latents: the moments that a VAE gives for those, likewise; under torchrun each process has a GPU and its share.
trajectories: the solver paths of a drift, for --config.trajectories.files of mid_training and straightening.
The same command goes on where a stopped one was, and makes anew what it finds damaged.
"""

from collections.abc import Iterator
from pathlib import Path

from absl import flags
from tqdm import tqdm

from flowmaps import FlowMap, UserError
from flowmaps.cli.run import required
from flowmaps.distributed import processes
from flowmaps.files import writable_directory

SRC = flags.DEFINE_string("src", None, "Folder or zip file of images, a folder a class")
SIZE = flags.DEFINE_integer("size", None, "Pixels of a side of the crops [64; of latents 256]", lower_bound=1)
VAE = flags.DEFINE_string("vae", None, "AutoencoderKL that makes the latents: directory or hub id")
FLIP = flags.DEFINE_bool("flip", False, "Latents of the mirror images too, as items of their own")
SKIP_CORRUPT = flags.DEFINE_bool("skip_corrupt", False, "Leave out files that are no whole images")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that decode images", lower_bound=0)
TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint whose drift is walked along")
OUT = flags.DEFINE_string("out", None, "Directory for the files; a set that was begun there is completed")
NUM = flags.DEFINE_integer("num", 8192, "Trajectories", lower_bound=1)
SOLVER = flags.DEFINE_string("solver", "heun", "euler, heun or dpm_solver")
STEPS = flags.DEFINE_integer("steps", 16, "Steps of a trajectory, each a training row")
SUBSTEPS = flags.DEFINE_integer("substeps", 1, "Solver steps in each of them, not kept", lower_bound=1)
GRID = flags.DEFINE_string("grid", "uniform", "uniform, log_snr or given")
LOW = flags.DEFINE_float("low", 0.0, "First time")
HIGH = flags.DEFINE_float("high", 0.996, "Last time but one, for --grid=log_snr")
TIMES = flags.DEFINE_list("times", [], "The times themselves, for --grid=given: 0,0.3,1")
START = flags.DEFINE_string("start", "noise", "noise, or data with noise added at time --low")
DATA = flags.DEFINE_string("data", None, "Data set, folder or zip file, for --start=data")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
SEED = flags.DEFINE_integer("seed", 0, "Seed of noise and data order")
BATCH = flags.DEFINE_integer("batch", 64, "Images encoded, or trajectories walked, at a time", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 1024, "Images or trajectories of a file", lower_bound=1)


def show(progress: Iterator[tuple[int, int]]) -> None:
    with tqdm(unit="shard", disable=None if processes().is_main_process else True) as bar:
        for bar.n, bar.total in progress:
            bar.refresh()


def images(size: int, vae: str | None = None) -> None:
    from flowmaps.data.prepare import Encoder, write_images
    from flowmaps.vae import open_vae

    src, out = Path(required(SRC, "ILSVRC/train")), writable_directory(Path(required(OUT, "data/imagenet")), "--out")
    encoder = Encoder(open_vae(vae).to(processes().device), vae, FLIP.value) if vae else None
    many = {"shard": SHARD.value, "batch": BATCH.value, "workers": WORKERS.value}
    show(write_images(out, src, SIZE.value or size, encoder, skip_corrupt=SKIP_CORRUPT.value, **many))


def latents() -> None:
    images(256, required(VAE, "stabilityai/sd-vae-ft-ema"))


def trajectories() -> None:
    from flowmaps.data import open_data
    from training.teacher_trajectories import Walk, parse, write_trajectories

    name, path = required(TEACHER, "runs/digits-flow"), required(OUT, "data/walks")
    options = parse(
        SOLVER.value, STEPS.value, GRID.value, LOW.value, HIGH.value, TIMES.value, START.value, SUBSTEPS.value
    )
    teacher = FlowMap.from_pretrained(name)
    if teacher.info.kind == "consistency":
        raise UserError(f"--teacher={name} is a consistency model and has no drift to walk along")
    size = teacher.info.shape[-1] if len(teacher.info.shape) == 3 else None
    data = open_data(DATA.value, ROOT.value, size) if DATA.value else None
    walk = Walk(teacher.to(processes().device), options)
    out = writable_directory(Path(path), "--out")
    show(write_trajectories(out, walk, NUM.value, SEED.value, BATCH.value, SHARD.value, data))


COMMANDS = {"imagenet": lambda: images(64), "latents": latents, "trajectories": trajectories}
