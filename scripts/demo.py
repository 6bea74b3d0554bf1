"""Three minutes on two cores: train a flow map and a flow-matching model on real scanned digits, and compare them.

python scripts/demo.py --workdir=runs/demo

Writes grid.png (the same noise at 1, 2, 4, 8 steps, map next to Euler), distance.png and report.html to --workdir.
"""

import json
import sys
from pathlib import Path

from absl import flags

from flowmaps import UserError
from flowmaps.cli.run import run
from flowmaps.errors import blame
from flowmaps.files import check_new_file

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory to write to; finished runs in it are reused")
STEPS = flags.DEFINE_integer("steps", 500, "Training steps of each model", lower_bound=1)
NUM = flags.DEFINE_integer("num", 1000, "Samples per distance", lower_bound=2)

CONFIG = "configs/digits.py"
COUNTS = (1, 2, 4, 8)
NEXT = """\
# more samples, more steps
python scripts/sample.py --checkpoint={map} --steps=1,2,4,8 --num=256 --out=runs/samples
# its distance to held-out digits, with the floor and a check for memorised images
python scripts/fid.py --checkpoint={map} --reference=digits:heldout --steps=1,2,4,8 --num=2000 --memorisation
# the same with more training
python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/long"""


def main() -> None:
    from flowmaps.evaluation import open_reference, report
    from flowmaps.evaluation.record import table
    from flowmaps.evaluation.references import train_set_score
    from training.config_rows import load_row
    from training.loop import train

    workdir = Path(WORKDIR.value)
    with blame("workdir", workdir):
        for name in ("grid.png", "distance.png", "report.html"):
            check_new_file(workdir / name)
    models, configs = {}, {}
    for name, row in (("flow map", "lagrangian"), ("Euler", "flow_matching")):
        config = configs[row] = load_row(CONFIG, row)
        config.steps = STEPS.value
        try:
            models[name] = train(config, workdir / row)
        except UserError as error:
            raise UserError(f"{workdir}: {error} (for the demo: --steps, or delete {workdir})") from None
    heldout = open_reference("digits:heldout")
    metric, floor = heldout.extractor.metric, train_set_score("digits", heldout.extractor)
    counts = {"flow map": COUNTS, "Euler": (*COUNTS, 32)}
    results = report.compare(models, counts, heldout, num=NUM.value, seed=1)
    pictures = {
        "grid": report.grid_of(models, COUNTS, columns=12, seed=0),
        "distance": report.plot(results, metric, floor),
    }
    images = config.steps * config.batch
    summary = (
        f"Two networks of the same size saw the same {images:,} scanned digits (8 x 8, with repeats). Above: the flow "
        f"map, which jumps; below: flow matching, which Euler's method integrates. {metric} is the Fréchet "
        f"distance of {NUM.value} samples to {heldout.stats.n} held-out digits, on features of a small classifier "
        f"(it is not FID). Training images themselves score {floor:.2f}: the floor."
    )
    numbers = table(results)
    report.write_report(
        workdir,
        pictures,
        title="flowmaps: the demo",
        summary=summary,
        numbers=numbers,
        commands=NEXT.format(map=workdir / "lagrangian"),
        config=json.dumps(configs["lagrangian"].to_dict(), indent=2),
    )
    print(f"{numbers}\nfloor: {floor:.4g}\nreport: {workdir / 'report.html'}")


if __name__ == "__main__":
    run(sys.modules[__name__])
