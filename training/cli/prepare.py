"""Prepare data for training, once: files that a run reads instead of computing them at each step.

python scripts/prepare_data.py imagenet --src=ILSVRC/Data/CLS-LOC/train --size=64 --out=data/imagenet64 --workers=8
python scripts/prepare_data.py latents --src=ILSVRC/Data/CLS-LOC/train --size=256 --vae=stabilityai/sd-vae-ft-ema \\
    --flip --out=data/imagenet256 --workers=8
python scripts/prepare_data.py trajectories --teacher=runs/digits-flow --out=data/walks --num=8192
python scripts/prepare_data.py trajectories --teacher=teachers/edm --out=data/walks --num=50000 \\
    --solver=dpm_solver --grid=log_snr --low=0.0062 --start=data --data=cifar10

imagenet: ADM's square crops of a folder or zip with one folder per class, of a Hugging Face dataset (--src=hf:REPO) or
of WebDataset shards (--src=wds:train-{000..099}.tar), for --config.data.name=prepared.
latents: the moments that a VAE gives for such crops; under torchrun each process has a GPU and makes its share.
trajectories: solver trajectories of a drift, for --config.trajectories.files of mid_training and straightening.
Run the same command again to resume after a stop and to replace damaged files.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.configs import shipped_configs
from flowmaps.errors import UserError, blame
from flowmaps.files import writable_directory

if TYPE_CHECKING:  # torch takes seconds to import, which help and mistakes need not wait for
    from training.config_sections import Trajectories

SRC = flags.DEFINE_string("src", None, "Folder or zip of images, one folder per class; hf:ADDRESS or wds:SHARDS")
SIZE = flags.DEFINE_integer("size", None, "Pixels per side of the crops [64; latents: 256]", lower_bound=1)
VAE = flags.DEFINE_string("vae", None, "AutoencoderKL that makes the latents: directory or hub id")
VAE_RANGE = flags.DEFINE_list("vae_range", ["-1", "1"], "Values of black and white for the VAE; EDM2 has 0,1")
FLIP = flags.DEFINE_bool("flip", False, "Add latents of the mirror images, as separate items")
SKIP_CORRUPT = flags.DEFINE_bool("skip_corrupt", False, "Leave out files that are not intact images")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that decode images", lower_bound=0, upper_bound=1024)
TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint whose drift is solved")
OUT = flags.DEFINE_string("out", None, "Directory for the files; a set that was started there is completed")
NUM = flags.DEFINE_integer("num", 8192, "Trajectories", lower_bound=1)
SOLVER = flags.DEFINE_string("solver", "heun", "euler, heun or dpm_solver")
STEPS = flags.DEFINE_integer("steps", 16, "Steps per trajectory; each is a training row")
SUBSTEPS = flags.DEFINE_integer("substeps", 1, "Solver steps in each of them; their states are not kept", lower_bound=1)
GRID = flags.DEFINE_string("grid", "uniform", "uniform, log_snr or given")
LOW = flags.DEFINE_float("low", 0.0, "First time")
HIGH = flags.DEFINE_float("high", 0.996, "Last time but one, for --grid=log_snr")
TIMES = flags.DEFINE_list("times", [], "The times themselves, for --grid=given: 0,0.3,1")
START = flags.DEFINE_string("start", "noise", "noise, or data with noise added at time --low")
DATA = flags.DEFINE_string("data", None, "Data set, folder or zip file, for --start=data")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
SEED = flags.DEFINE_integer("seed", 0, "Seed of noise and data order")
BATCH = flags.DEFINE_integer("batch", 64, "Images encoded, or trajectories solved, at a time", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 1024, "Images or trajectories per file", lower_bound=1)
READS, WRITES = (SRC, VAE, TEACHER, DATA), (OUT,)


def show(progress: Iterator[tuple[int, int]]) -> None:
    from tqdm import tqdm

    from flowmaps.distributed import processes
    from training.log import PAUSE, clock

    main, begun, first = processes().is_main_process, time.perf_counter(), None
    shown = begun
    with tqdm(unit="shard", disable=None if main else True) as bar:
        for done, total in progress:
            bar.n, bar.total = done, total
            bar.refresh()
            first, now = done if first is None else first, time.perf_counter()
            if main and bar.disable and done > first and (now - shown >= PAUSE or done == total):  # in a log file
                left = (now - begun) / (done - first) * (total - done)
                print(f"shard {done}/{total} {clock(now - begun)}<{clock(left)}", flush=True)
                shown = now


def told(out: Path, *flags: str) -> None:
    """Say where the set is, and the command that trains on it."""
    from flowmaps.distributed import processes

    if processes().is_main_process:
        print(f"wrote    {out}")
        print(next_command.show(next_command.command("train", *flags, f"--workdir=runs/{out.name}")))


def images(size: int, vae: str | None = None) -> None:
    src = required(SRC, "ILSVRC/train")
    out = output(required(OUT, "data/imagenet"))

    from flowmaps.data.prepare import Encoder, write_images
    from flowmaps.data.shard_writing import check_directory
    from flowmaps.distributed import processes
    from flowmaps.vae import open_vae

    kind, values = "latents" if vae else "images", vae_range()
    check_directory(out, kind)
    encoder = Encoder(open_vae(vae).to(processes().device), vae, FLIP.value, values) if vae else None
    counts = {"shard": SHARD.value, "batch": BATCH.value, "workers": WORKERS.value}
    size = SIZE.value or size
    show(write_images(out, src, size, encoder, skip_corrupt=SKIP_CORRUPT.value, **counts))
    name = f"imagenet{size}"
    row = f"{name}:lagrangian" if name in shipped_configs() else "FILE:ROW"
    told(out, f"--config={row}", "--config.data.name=prepared", f"--config.data.root={out}")


def vae_range() -> tuple[float, float]:
    from flowmaps.info import check_vae_range

    try:
        low, high = map(float, VAE_RANGE.value)
    except ValueError:
        raise UserError("give two numbers, such as 0,1", "vae_range", ",".join(VAE_RANGE.value)) from None
    return check_vae_range((low, high))


def output(path: str) -> Path:
    with blame("out", path):
        return writable_directory(Path(path))


def latents() -> None:
    images(256, required(VAE, "stabilityai/sd-vae-ft-ema"))


def from_flags() -> "Trajectories":
    """Read and check the options of trajectories."""
    from training.config_sections import Grid, Solver, Start, Trajectories
    from training.teacher_trajectories import trajectory_times

    for flag, choices in ((SOLVER, Solver), (GRID, Grid), (START, Start)):
        if flag.value not in choices.__members__:
            raise UserError(f"choose one of {', '.join(choices.__members__)}", field=flag.name, value=flag.value)
    try:
        times = tuple(float(time) for time in TIMES.value)
    except ValueError:
        raise UserError("give numbers, such as 0,0.3,1", field="times", value=",".join(TIMES.value)) from None
    options = Trajectories(
        solver=Solver[SOLVER.value],
        steps=STEPS.value,
        grid=Grid[GRID.value],
        low=LOW.value,
        high=HIGH.value,
        times=times,
        start=Start[START.value],
        substeps=SUBSTEPS.value,
    )
    trajectory_times(options)
    return options


def trajectories() -> None:
    name, out = required(TEACHER, "runs/digits-flow"), output(required(OUT, "data/walks"))

    from flowmaps.data import open_dataset
    from flowmaps.data.shard_writing import check_directory
    from flowmaps.distributed import processes
    from flowmaps.flow_map import FlowMap
    from training.teacher_trajectories import TrajectorySolver, write_trajectories

    options = from_flags()
    check_directory(out, "trajectories")
    with blame("teacher", name):
        teacher = FlowMap.from_pretrained(name)
        if teacher.info.kind == "consistency":
            raise UserError("a consistency model has no drift to solve")
    size = teacher.info.shape[-1] if len(teacher.info.shape) == 3 else None
    data = open_dataset(DATA.value, root=ROOT.value, size=size) if DATA.value else None
    solver = TrajectorySolver(teacher.to(processes().device), options)
    show(write_trajectories(out, solver, NUM.value, SEED.value, BATCH.value, SHARD.value, data))
    told(out, "--config=FILE:mid_training", f"--config.trajectories.files={out}")


COMMANDS = {"imagenet": lambda: images(64), "latents": latents, "trajectories": trajectories}
