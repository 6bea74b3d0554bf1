"""Fit step sizes to a checkpoint: the best grid of a few steps, by dynamic programming.

python scripts/schedule.py --checkpoint=runs/digits-flow --steps=2,4,8 --out=schedule.json --plot=schedule.png
python scripts/schedule.py --checkpoint=runs/digits --steps=2,4 --sampler=map --store

Prints the error at data of the fitted grids and of equal steps, on other noise than the fit used, and with --reference
the distances of samples by both. Where equal steps are as good, --out has equal steps and --store leaves the count out:
sample.py, fid.py and the pipeline use the step sizes stored in a checkpoint, and equal steps for all other counts.
A smaller error need not bring samples closer to data, so give --reference if there is one.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, write_json

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Exported directory, run directory or hub id")
STEPS = flags.DEFINE_list("steps", ["2", "4", "8"], "Step counts")
OUT = flags.DEFINE_string("out", None, "JSON file for the schedule")
STORE = flags.DEFINE_bool("store", False, "Store the schedule in the checkpoint")
PLOT = flags.DEFINE_string("plot", None, "PNG file for the grids and the costs")
SAMPLER = flags.DEFINE_string("sampler", None, "euler, heun or map; by default map for a map and euler for a drift")
COST_NAMES = ["end", "end_root", "local", "local_root"]  # of flowmaps.step_sizes.COSTS
COST = flags.DEFINE_enum("cost", "end", COST_NAMES, "How the error of a jump counts")
REFERENCE = flags.DEFINE_string("reference", None, "Keep only grids with a smaller distance to this, as in fid.py")
NUM = flags.DEFINE_integer("num", 5000, "Samples for each distance", lower_bound=2)
NOISES = flags.DEFINE_integer("noises", 256, "Number of paths to fit on", lower_bound=1)
SEED = flags.DEFINE_integer(
    "seed",
    1,
    "Seed of their noise (and this + 1 for distances); use another seed for the samples that you score",
    lower_bound=0,
)
FINE = flags.DEFINE_integer("fine", None, "Steps of the fine grid that the times are taken from", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance weight that will be sampled with", 1.0)
BATCH = flags.DEFINE_integer("batch", 128, "Paths at a time", lower_bound=1)
READS, WRITES = (CHECKPOINT, REFERENCE), (OUT, PLOT)


def main() -> None:
    checkpoint = required(CHECKPOINT, "runs/digits")
    if not (OUT.value or STORE.value):
        raise UserError("give --out=FILE.json, or --store to write the schedule into the checkpoint")
    if STORE.value and not Path(checkpoint).is_dir():
        raise UserError("needs a directory for --store: use --out=FILE.json", field="checkpoint", value=checkpoint)
    if PLOT.value and Path(PLOT.value).suffix.lower() != ".png":
        raise UserError("must end in .png, the format that is written", field="plot", value=PLOT.value)
    for name, file in (("out", OUT.value), ("plot", PLOT.value)):
        if file:
            with blame(name, file):
                check_new_file(Path(file))
    try:
        steps = [int(count) for count in STEPS.value]
    except ValueError:
        raise UserError("give whole numbers, such as 2,4,8", field="steps", value=",".join(STEPS.value)) from None

    from flowmaps.distributed import pick_device
    from flowmaps.evaluation import check_scorable, evaluate, open_reference
    from flowmaps.evaluation.plots import step_sizes
    from flowmaps.evaluation.record import table
    from flowmaps.evaluation.references import model_size
    from flowmaps.export import store_schedule
    from flowmaps.flow_map import FlowMap
    from flowmaps.images import write_png
    from flowmaps.step_sizes import check_choices, fit
    from samplers import Schedule

    check_choices(steps, SAMPLER.value, COST.value, FINE.value)
    fm = FlowMap.from_pretrained(checkpoint).to(pick_device())
    reference = open_reference(REFERENCE.value, size=model_size(fm)) if REFERENCE.value else None
    if reference:
        with blame("reference", REFERENCE.value):
            check_scorable(fm, reference, NUM.value)
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
    better, rows = schedule.better(), dict[int, dict[str, Any]]()
    for count in schedule:
        errors = {"error": schedule.errors[count], "error of equal steps": schedule.uniform_errors[count]}
        rows[count] = {"steps": count, **errors}
    if reference and better:
        record = evaluate(
            fm,
            reference,
            steps=list(better),
            num=NUM.value,
            seeds=(SEED.value + 1,),
            sampler=schedule.sampler,
            schedule=(better, "uniform"),
            guidance=GUIDANCE.value or 1.0,
        )
        name, found = record["metric"], {(row["grid"], row["steps"]): row for row in record["results"]}
        equal = f"{name} of equal steps"
        for count, row in rows.items():
            scored = (found[grid, count][name] if count in better else "" for grid in ("given", "uniform"))
            row |= dict(zip((name, equal), scored, strict=True))
        better = better.only(*(n for n in better if rows[n][name] < rows[n][equal]))
    written = replace(schedule, grids={**Schedule.uniform(*schedule).grids, **better.grids})
    for count, times in written.items():
        kept = " ".join(f"{t:.3g}" for t in times.tolist()) if count in better else "equal steps"
        rows[count]["grid"] = kept  # the table leaves out "times"
    if OUT.value:
        write_json(Path(OUT.value), asdict(written))
    if STORE.value:
        store_schedule(checkpoint, better)
    if PLOT.value:
        write_png(step_sizes(fitted), Path(PLOT.value))
    print(table(list(rows.values())))
    if STORE.value:
        counts = f"{', '.join(map(str, better))} step{'s' * (list(better) != [1])}" if better else "no number of steps"
        print(f"stored for {counts} in {checkpoint}; all other counts are sampled in uniform steps")
    for name, file in (("wrote", OUT.value), ("plot", PLOT.value)):
        if file:
            print(f"{name:8} {file}")
    flags = [f"--sampler={schedule.sampler}", f"--steps={','.join(map(str, schedule))}"]
    flags += [] if STORE.value else [f"--schedule={OUT.value}"]
    if GUIDANCE.value or fm.info.recommended_guidance:  # which is not at all times, as these step sizes are for
        flags.append(f"--guidance={GUIDANCE.value or 1:g}")
    print(next_command.show(next_command.command("sample", f"--checkpoint={checkpoint}", *flags, "--out=samples")))
