"""Train a flow map, or resume a run: the same command does both.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits --config.optim.lr=1e-3 --dry_run
python scripts/train.py --config=configs/digits.py:pipeline --workdir=runs/chain --config.post_training.steps=2000

A row that is a chain trains its stages in WORKDIR/pre_training, mid_training and post_training.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame
from flowmaps.files import writable_directory

if TYPE_CHECKING:
    from PIL import Image

CONFIG = config_flags.DEFINE_config_file("config", None, "File and row: configs/digits.py:lagrangian[,smoke]")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is resumed")
STAGE = flags.DEFINE_string(
    "stage", "", "The only stage of a chain to train; the stages that it starts from must exist"
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build everything, take two steps on a few images, draw a grid, stop")


def main() -> None:
    if CONFIG.value is None:
        raise UserError("missing, e.g. --config=configs/digits.py:lagrangian", field="config")
    workdir = "" if DRY_RUN.value else required(WORKDIR, "runs/digits")
    config = CONFIG.value

    from flowmaps.distributed import processes
    from training.chain import run_chain, table
    from training.config_rows import Chain
    from training.dry_run import dry_run, dry_run_chain
    from training.loop import train

    if STAGE.value and (DRY_RUN.value or not isinstance(config, Chain)):
        reason = "a dry run tries all stages" if DRY_RUN.value else "this row is one run, not a chain"
        raise UserError(f"{reason}, leave it out", field="stage", value=STAGE.value)
    if DRY_RUN.value:
        for stage, facts, picture in dry_run_chain(config) if isinstance(config, Chain) else [("", *dry_run(config))]:
            show(stage, facts, picture)
    elif isinstance(config, Chain):
        records = run_chain(config, workdir, STAGE.value)
        if processes().is_main_process:
            print(table(records))
    else:
        train(config, workdir)


def show(stage: str, facts: dict[str, Any], picture: "Image.Image") -> None:
    """Print the facts of a dry run and save its picture to --workdir."""
    for name, fact in facts.items():
        print(f"{stage} {name}: {fact}".strip())
    if WORKDIR.value is not None:
        with blame("workdir", WORKDIR.value):
            directory = writable_directory(Path(WORKDIR.value))
        path = directory / f"dry-run{'-' * bool(stage)}{stage}.png"
        picture.save(path)
        print(f"{stage} grid: {path}".strip())
