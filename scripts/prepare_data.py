"""Prepare data for training, once: files that a run reads instead of making them at each step.

python scripts/prepare_data.py trajectories --teacher=runs/digits-flow --out=data/walks --num=8192
python scripts/prepare_data.py trajectories --teacher=teachers/edm --out=data/walks --num=50000 \\
    --solver=dpm_solver --grid=log_snr --low=0.0062 --start=data --data=cifar10

trajectories: the solver paths of a drift, for --config.trajectories.files of the objectives mid_training and
straightening. The same command goes on where a stopped one was.
"""

import enum
from pathlib import Path

import torch
from absl import flags
from tqdm import tqdm

from flowmaps import FlowMap, UserError
from flowmaps.files import writable_directory
from training import cli

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
BATCH = flags.DEFINE_integer("batch", 256, "Trajectories walked at a time", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 1024, "Trajectories of a file", lower_bound=1)


def choice(kind: type[enum.Enum], name: str, value: str) -> enum.Enum:
    if value not in kind.__members__:
        raise UserError(f"--{name}={value}: choose one of {', '.join(kind.__members__)}")
    return kind[value]


def trajectories() -> None:
    from training.config import Grid, Solver, Start, Trajectories
    from training.data import DATA as KNOWN
    from training.data import load_data
    from training.prepare import write_trajectories
    from training.walk import Walk, grid

    if TEACHER.value is None or OUT.value is None:
        missing = "teacher" if TEACHER.value is None else "out"
        raise UserError(f"--{missing} is missing: e.g. --teacher=runs/digits-flow --out=data/walks")
    solver, kind, start = choice(Solver, "solver", SOLVER.value), choice(Grid, "grid", GRID.value), START.value
    try:
        times = tuple(float(time) for time in TIMES.value)
    except ValueError:
        raise UserError(f"--times={','.join(TIMES.value)}: give numbers, such as 0,0.3,1") from None
    options = Trajectories(
        solver, STEPS.value, kind, LOW.value, HIGH.value, times, choice(Start, "start", start), SUBSTEPS.value
    )
    grid(options, "--")
    teacher = FlowMap.from_pretrained(TEACHER.value)
    if teacher.info.kind == "consistency":
        raise UserError(f"--teacher={TEACHER.value} is a consistency model and has no drift to walk along")
    data = None
    if DATA.value is not None:
        name = DATA.value if DATA.value in KNOWN else "zip" if DATA.value.endswith(".zip") else "folder"
        size = teacher.info.shape[-1] if len(teacher.info.shape) == 3 else None
        data = load_data(name, ROOT.value if DATA.value in KNOWN else DATA.value, size, False)
    out = writable_directory(Path(OUT.value), "--out")
    walk = Walk(teacher.to("cuda" if torch.cuda.is_available() else "cpu"), options)
    with tqdm(total=NUM.value, unit="path", disable=None) as bar:
        for done in write_trajectories(out, walk, NUM.value, SEED.value, BATCH.value, SHARD.value, data):
            bar.update(done - bar.n)


if __name__ == "__main__":
    cli.run({"trajectories": trajectories})
