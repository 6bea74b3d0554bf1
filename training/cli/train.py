"""Train a flow map, or resume a run: the same command does both.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits --config.optim.lr=1e-3 --dry_run
python scripts/train.py --config=configs/digits.py:pipeline --workdir=runs/chain --config.post_training.steps=2000
python scripts/train.py --config=configs/imagenet256.py:mean_flow --forecast=80 --gpus=8

A row that is a chain trains its stages in WORKDIR/pre_training, mid_training and post_training.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, writable_directory, write_json
from training.cli import config_file

if TYPE_CHECKING:
    from PIL import Image


class Memory(flags.ArgumentParser[Any]):
    """A number of GiB; the flag alone means 80."""

    def parse(self, argument: Any) -> float | None:
        return {"true": 80.0, "false": None}[argument] if argument in ("true", "false") else float(argument)


CONFIG = config_file.define("File and row: configs/digits.py:lagrangian[,smoke]")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is resumed")
STAGE = flags.DEFINE_string(
    "stage", "", "The only stage of a chain to train; the stages that it starts from must exist"
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build everything, take two steps on a few images, draw a grid, stop")
_forecast: flags.Flag[Any] = flags.Flag(
    Memory(),
    None,
    "forecast",
    None,
    "Forecast memory and time of a step from the config alone, for a GPU of so many GiB",
)
_forecast.boolean = True  # it may come without a value
FORECAST = flags.DEFINE_flag(_forecast)
GPUS = flags.DEFINE_integer("gpus", None, "GPUs of the forecast, by default as many as there are processes")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of a GPU's peak that the forecast assumes")
JSON = flags.DEFINE_string("json", None, "File for the forecast as a list of records, one per stage")


def main() -> None:
    if CONFIG.value is None:
        raise UserError("missing, e.g. --config=configs/digits.py:lagrangian", field="config")
    config, tries = CONFIG.value, "forecast" if FORECAST.value is not None else "dry run" if DRY_RUN.value else ""
    workdir = "" if tries else required(WORKDIR, "runs/digits")

    from flowmaps.distributed import processes
    from training.chain import run_chain, table
    from training.config_rows import Chain
    from training.dry_run import dry_run, dry_run_chain
    from training.loop import train

    if STAGE.value and (tries or not isinstance(config, Chain)):
        reason = f"a {tries} tries all stages" if tries else "this row is one run, not a chain"
        raise UserError(f"{reason}, leave it out", field="stage", value=STAGE.value)
    if FORECAST.value is not None:
        show_forecast(config)
    elif DRY_RUN.value:
        for stage, facts, picture in dry_run_chain(config) if isinstance(config, Chain) else [("", *dry_run(config))]:
            show(stage, facts, picture)
    elif isinstance(config, Chain):
        records = run_chain(config, workdir, STAGE.value)
        if processes().is_main_process:
            print(table(records))
    else:
        train(config, workdir)


def show_forecast(config: Any) -> None:
    """Print the forecast of a run or of each stage of a chain, and write it to --json."""
    from training.forecast.report import forecasts, lines

    gpus = int(os.environ.get("WORLD_SIZE", 1)) if GPUS.value is None else GPUS.value
    if int(os.environ.get("RANK", 0)):
        return  # the first process prints it
    records = []
    for stage, record in forecasts(config, FORECAST.value, gpus, MFU.value):
        records.append({"stage": stage, **record})
        for line in lines(record):
            print(f"{stage} {line}".strip(), flush=True)
    if JSON.value is not None:
        with blame("json", JSON.value):
            check_new_file(Path(JSON.value))
        write_json(Path(JSON.value), records)


def show(stage: str, facts: dict[str, Any], picture: "Image.Image") -> None:
    """Print the facts of a dry run and save its picture to --workdir."""
    from flowmaps.images import write_png

    for name, fact in facts.items():
        print(f"{stage} {name}: {fact}".strip())
    if WORKDIR.value is not None:
        with blame("workdir", WORKDIR.value):
            directory = writable_directory(Path(WORKDIR.value))
        path = directory / f"dry-run{'-' * bool(stage)}{stage}.png"
        write_png(picture, path)
        print(f"{stage} grid: {path}".strip())
