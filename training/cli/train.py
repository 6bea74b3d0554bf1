"""Train a flow map, or resume a run: the same command does both.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits --config.optim.lr=1e-3 --dry_run
python scripts/train.py --config=configs/digits.py:pipeline --workdir=runs/chain --config.post_training.steps=2000
python scripts/train.py --config=configs/imagenet256.py:mean_flow --forecast=80 --gpus=8

A row that is a chain trains its stages in WORKDIR/pre_training, mid_training and post_training. With --seeds=0,1,2
there is a run for each seed, one after the other, in WORKDIR/seed-0 and so on.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import LARGEST_SEED, required
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, write_json
from training.cli import config_file

if TYPE_CHECKING:
    from PIL import Image

    from training.config import Config


class Memory(flags.ArgumentParser[Any]):
    """A number of GiB; the flag alone means 80."""

    def parse(self, argument: Any) -> float | None:
        return {"true": 80.0, "false": None}[argument] if argument in ("true", "false") else float(argument)


CONFIG = config_file.define("Shipped config or your own file, and a row of it: digits:lagrangian[,smoke]")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is resumed")
STAGE = flags.DEFINE_string(
    "stage", "", "The only stage of a chain to train; the stages that it starts from must exist"
)
SEEDS = flags.DEFINE_list("seeds", None, "Seeds, such as 0,1,2: a run of each in WORKDIR/seed-N, in turn")
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
        raise UserError("missing, e.g. --config=digits:lagrangian", field="config")
    config = CONFIG.value
    workdir = "" if DRY_RUN.value or FORECAST.value is not None else required(WORKDIR, "runs/digits")

    numbers = None if SEEDS.value is None else seeds(SEEDS.value)
    if FORECAST.value is not None:
        show_forecast(config)
        return

    from flowmaps.distributed import join
    from training.chain import run_chain, table
    from training.config_rows import Chain
    from training.dry_run import dry_run, dry_run_chain
    from training.loop import train

    stages = config.stages() if isinstance(config, Chain) else {"": config}
    main = join(next(iter(stages.values())).timeout).rank == 0
    if STAGE.value and (DRY_RUN.value or not isinstance(config, Chain)):
        raise _stage_refused(chain=isinstance(config, Chain))
    places: dict[str, int | None] = {workdir: None}
    if numbers is not None:
        places = {str(Path(workdir) / f"seed-{n}"): n for n in numbers}
    if DRY_RUN.value:
        pictures = {stage: grid_file(stage) for stage in stages} if main and WORKDIR.value is not None else {}
        for stage, facts, picture in dry_run_chain(config) if isinstance(config, Chain) else [("", *dry_run(config))]:
            if main:
                show(stage, facts, picture, pictures.get(stage))
    for place, seed in places.items() if not DRY_RUN.value else ():
        for run in stages.values() if seed is not None else ():
            run.seed = seed
        if isinstance(config, Chain):
            records = run_chain(config, place, STAGE.value)
            if main:
                print(table(records))
        else:
            train(config, place)
    if main and not DRY_RUN.value:
        name = STAGE.value or list(stages)[-1]
        print(next_commands(stages[name], str(Path(place) / name)), file=sys.stderr)
        if numbers is not None and not isinstance(config, Chain):
            print(next_command.show(next_command.command("compare", workdir)), file=sys.stderr)


def seeds(texts: list[str]) -> list[int]:
    """Return the seeds of --seeds."""
    if DRY_RUN.value or FORECAST.value is not None:
        raise UserError("a forecast or a dry run has no use for seeds: leave it out", "seeds", ",".join(texts))
    try:
        found = [int(text) for text in texts]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(0 <= seed <= LARGEST_SEED for seed in found):
        raise UserError("give different whole numbers, such as 0,1,2", "seeds", ",".join(texts))
    return found


def next_commands(config: "Config", workdir: str) -> str:
    """Return the commands that sample from the run in ``workdir`` and score it, a line each."""
    from flowmaps.data import Latents
    from flowmaps.data.registry import prepared_kind, source_of
    from flowmaps.info import FlowMapInfo
    from training.config import build_objective

    sampler, data = FlowMapInfo(kind=build_objective(config).kind).sampler, config.data
    commands = [next_command.sample(workdir, sampler)]
    if prepared_kind(Path(data.root)) is not Latents:  # which are not what the model is compared with
        source, look = source_of(data.name, data.root), (data.fit.value, data.background.value)
        if look != ("crop", "white"):  # statistics of images that look as in training
            flags = [f"--data={source}", f"--size={getattr(config.network, 'image_size', 0)}"]
            file = f"{workdir.rstrip('/')}-reference.npz"
            flags += [f"--fit={look[0]}", f"--background={look[1]}", f"--out={file}"]
            commands.append(next_command.command("stats", *flags))
            source = file
        commands.append(next_command.fid(workdir, source, next_command.sampling(sampler), data.root))
    return next_command.show(*commands)


def _stage_refused(chain: bool) -> UserError:
    reason = "a forecast or a dry run tries all stages" if chain else "this row is one run, not a chain"
    return UserError(f"{reason}: leave it out", field="stage", value=STAGE.value)


def show_forecast(config: Any) -> None:
    """Print the forecast of a run or of each stage of a chain, and write it to --json."""
    from training.config_rows import Chain
    from training.forecast.report import forecasts, lines

    if STAGE.value:
        raise _stage_refused(chain=isinstance(config, Chain))
    gpus = int(os.environ.get("WORLD_SIZE", 1)) if GPUS.value is None else GPUS.value
    if int(os.environ.get("RANK", 0)):
        return  # the first process prints it
    if JSON.value is not None:
        with blame("json", JSON.value):
            check_new_file(Path(JSON.value))
    records = []
    for stage, record in forecasts(config, FORECAST.value, gpus, MFU.value):
        records.append({"stage": stage, **record})
        for line in lines(record):
            print(f"{stage} {line}".strip(), flush=True)
    if JSON.value is not None:
        write_json(Path(JSON.value), records)


def grid_file(stage: str) -> Path:
    """Return the file in --workdir for the picture of a dry run, after a look at what is there."""
    with blame("workdir", WORKDIR.value):
        return check_new_file(Path(WORKDIR.value or "") / f"dry-run{'-' * bool(stage)}{stage}.png")


def show(stage: str, facts: dict[str, Any], picture: "Image.Image", file: Path | None) -> None:
    """Save the picture of a dry run to ``file``, if any, and print its facts."""
    from flowmaps.images import write_png

    if file is not None:
        write_png(picture, file)
        facts = {**facts, "grid": file}
    for name, fact in facts.items():
        print(f"{stage} {name}: {fact}".strip())
