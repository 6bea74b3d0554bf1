"""Three minutes on two cores: train a flow map and a flow-matching model on real scanned digits, and compare them.

python scripts/demo.py --workdir=runs/demo

Writes report.html to --workdir, and its pictures: grid.png (real images, and the same noise in 1, 2, 4, 8 steps of each
model), distance.png and loss.png.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from flowmaps import UserError
from flowmaps.cli.run import run
from flowmaps.errors import blame
from flowmaps.files import check_new_file

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory to write to; finished runs in it are reused")
STEPS = flags.DEFINE_integer("steps", 500, "Training steps of each model", lower_bound=1)
NUM = flags.DEFINE_integer("num", 1000, "Samples per distance", lower_bound=2)

CONFIG = "configs/digits.py"
COUNTS, COLUMNS = (1, 2, 4, 8), 12
TRAINED = ("flow map", "flow matching")  # how the two models are trained
NEXT = {  # what a command does: its words
    "More samples": "python scripts/sample.py --checkpoint={0}/lagrangian --steps=1,2,4,8 --num=256 --out={0}/samples",
    "Their distance to held-out digits, with the floor and a check for memorised images": (
        "python scripts/fid.py --checkpoint={0}/lagrangian --reference=digits:heldout --steps=1,2,4,8 --num=2000 "
        "--memorisation"
    ),
    "Three times the training": "python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/long",
}


def main() -> None:
    import torch

    from flowmaps.data import open_dataset
    from flowmaps.evaluation import open_reference, plots, report
    from flowmaps.evaluation.real_images import train_set_score
    from flowmaps.evaluation.record import table
    from flowmaps.images import from_uint8
    from training.config_rows import load_row
    from training.log import read_log
    from training.loop import train

    workdir = Path(WORKDIR.value)
    with blame("workdir", workdir):
        for name in ("grid.png", "distance.png", "loss.png", "report.html"):
            check_new_file(workdir / name)
    models, configs, losses = dict[str, Any](), {}, []
    for name, row, trained in zip(report.MODELS, ("lagrangian", "flow_matching"), TRAINED, strict=True):
        config = configs[row] = load_row(CONFIG, row)
        config.steps = STEPS.value
        try:
            models[name] = train(config, workdir / row)
        except UserError as error:
            raise UserError(f"{workdir}: {error} (for the demo: --steps, or delete {workdir})") from None
        logged = [entry for entry in read_log(workdir / row / "log.jsonl") if entry.get("loss")]
        losses += [(trained, "training loss", int(entry["step"]), float(entry["loss"])) for entry in logged]
    print("scoring both", file=sys.stderr, flush=True)
    heldout = open_reference("digits:heldout")
    known = open_dataset("digits"), open_dataset("digits", "heldout")
    metric, floor = heldout.extractor.metric, train_set_score(*known, heldout.extractor)
    counts = dict(zip(report.MODELS, (COUNTS, (*COUNTS, 32)), strict=True))
    results = report.compare(models, counts, heldout, num=NUM.value, seed=1)
    real = from_uint8(open_dataset("digits").fetch(torch.arange(COLUMNS))[0])
    pictures = {
        "grid": report.grid_of(models, COUNTS, columns=COLUMNS, seed=0, real=real),
        "distance": report.plot(results, metric, floor),
        "loss": plots.lines(losses, xlabel="training steps"),
    }
    objective: Any = configs["lagrangian"].objective
    conclusions = report.conclusions(results, metric, floor, objective.diagonal)
    images = config.steps * config.batch
    summary = (
        f"Two networks of the same size saw the same {images:,} scanned digits (8 x 8, with repeats). The flow map "
        "jumps from noise to an image in as many steps as you like. Flow matching learns the drift alone, which "
        f"Euler's method follows. {metric} is the Fréchet distance of {NUM.value:,} samples to {heldout.stats.n} "
        "held-out digits, on features of a small classifier (it is not FID)."
    )
    report.write_report(
        workdir,
        pictures,
        title="flowmaps: the demo",
        summary=summary,
        conclusions=conclusions,
        numbers=report.numbers(results, metric, floor),
        commands={what: [word.format(workdir) for word in words.split()] for what, words in NEXT.items()},
        config=json.dumps(configs["lagrangian"].to_dict(), indent=2),
    )
    print("\n".join([table(results), f"floor: {floor:.4g}\n", *conclusions, f"report: {workdir / 'report.html'}"]))


if __name__ == "__main__":
    run(sys.modules[__name__])
