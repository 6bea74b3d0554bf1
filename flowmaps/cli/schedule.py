"""Fit step sizes to a checkpoint: the best grid of a few steps, by dynamic programming.

python scripts/schedule.py --checkpoint=runs/digits-flow --steps=2,4,8 --out=schedule.json --plot=schedule.png
python scripts/schedule.py --checkpoint=runs/digits --steps=2,4 --sampler=map --store

Prints the error at data of the fitted grids and of equal steps, on other noise than the fit used; where equal steps are
better, they are written instead. sample.py, fid.py and the pipeline use the step sizes stored in a checkpoint.
"""

from dataclasses import asdict
from pathlib import Path

from absl import flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, write_json

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Exported directory, run directory or hub id")
STEPS = flags.DEFINE_list("steps", ["2", "4", "8"], "Step counts")
OUT = flags.DEFINE_string("out", None, "JSON file for the schedule")
STORE = flags.DEFINE_bool("store", False, "Store the schedule in the checkpoint")
PLOT = flags.DEFINE_string("plot", None, "PNG file for the grids and the costs")
SAMPLER = flags.DEFINE_string("sampler", None, "euler, heun or map; by default map for a map and euler for a drift")
COST = flags.DEFINE_string("cost", "end", "How the error of a jump counts: end, end_root, local or local_root")
NOISES = flags.DEFINE_integer("noises", 256, "Number of paths to fit on", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 1, "Seed of their noise; use another seed for the samples that you score")
FINE = flags.DEFINE_integer("fine", None, "Steps of the fine grid that the times are taken from", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance weight that will be sampled with", 1.0)
BATCH = flags.DEFINE_integer("batch", 128, "Paths at a time", lower_bound=1)
READS, WRITES = (CHECKPOINT,), (OUT, PLOT)


def main() -> None:
    checkpoint = required(CHECKPOINT, "runs/digits")
    if not (OUT.value or STORE.value):
        raise UserError("give --out=FILE.json, or --store to write the schedule into the checkpoint")
    for name, file in (("out", OUT.value), ("plot", PLOT.value)):
        if file:
            with blame(name, file):
                check_new_file(Path(file))
    try:
        steps = [int(count) for count in STEPS.value]
    except ValueError:
        raise UserError("give whole numbers, such as 2,4,8", field="steps", value=",".join(STEPS.value)) from None

    from flowmaps.distributed import pick_device
    from flowmaps.evaluation.record import table
    from flowmaps.evaluation.report import step_sizes
    from flowmaps.export import store_schedule
    from flowmaps.flow_map import FlowMap
    from flowmaps.images import write_png
    from flowmaps.step_sizes import fit

    fm = FlowMap.from_pretrained(checkpoint).to(pick_device())
    fitted = fit(
        fm,
        steps,
        sampler=SAMPLER.value,
        cost=COST.value,
        noises=NOISES.value,
        seed=SEED.value,
        fine=FINE.value,
        guidance=GUIDANCE.value,
        batch=BATCH.value,
    )
    schedule = fitted.schedule
    rows = []
    for count, times in schedule.items():
        ours, equal = schedule.errors[count], schedule.uniform_errors[count]
        kept = " ".join(f"{t:.3g}" for t in times.tolist()) if ours < equal else "equal steps"
        rows.append({"steps": count, "error": ours, "error of equal steps": equal, "times": kept})
    if OUT.value:
        write_json(Path(OUT.value), asdict(schedule))
    if STORE.value:
        store_schedule(checkpoint, schedule)
    if PLOT.value:
        write_png(step_sizes(fitted), Path(PLOT.value))
    print(table(rows))
