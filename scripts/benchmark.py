"""The experiments behind the tables in README and docs.

python scripts/benchmark.py --suite=checkerboard --seeds=0,1,2 --cpu_minutes=2 --json=checkerboard.json
python scripts/benchmark.py --suite=digits --rows=lagrangian --seeds=0,1,2 --json=digits.json
python scripts/benchmark.py --suite=fashion_mnist --rows=lagrangian+cpu,imf+cpu+network.head_depth=0 --cpu_minutes=9
python scripts/benchmark.py --suite=learning --rows=lagrangian,lagrangian_edm2 --rates=2e-3,1e-2 --plot=learning.png
python scripts/benchmark.py --suite=optimisers --rates=1e-3,3e-3,1e-2,3e-2 --seeds=0 --plot=optimisers.png
python scripts/benchmark.py --suite=mid_training --rows=digits --threads=1 --plot=mid-training.png
python scripts/benchmark.py --suite=guidance --seeds=0,1,2 --threads=1
python scripts/benchmark.py --suite=composition --rows=digits --cpu_minutes=6 --threads=1 --json=composition.json
python scripts/benchmark.py --suite=gate --threads=1 --json=gate.json
python scripts/benchmark.py --suite=bellman --rows=digits --threads=1 --plot=bellman.png
python scripts/benchmark.py --suite=steering --rows=plane --threads=1
python scripts/benchmark.py --suite=step --threads=1  # or sample, networks, layout, routes, precision, profile, ...
python scripts/benchmark.py --suite=fid --num=512

Prints a Markdown table (mean over seeds ± half the range). KL@n, W2@n, map@n and euler@n are at n sampling steps.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from absl import flags

from flowmaps.cli.run import run
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, to_json

SUITE = flags.DEFINE_string(
    "suite",
    None,
    "bellman (step sizes), checkerboard, composition (which parts pay), digits, fashion_mnist, gate (false alarms and "
    "power), guidance (baked in), learning (curves), mid_training (its gain for post-training), networks (time and "
    "memory of each objective), optimisers (curves), precision (errors of derivatives), routes (of a constant "
    "derivative: time and memory), segments (where on its path a checkpoint errs), steering (laws, images, classes, "
    "inversion), or timings: deployment (runtimes), ema, fid, folders, layout, profile, resume, sample, sources, step",
)
ROWS = flags.DEFINE_list(
    "rows", None, "Rows of the suite's config, with settings after +; of networks: small ones, or names of presets"
)
RATES = flags.DEFINE_list("rates", [], "Learning rates, for --suite=learning, optimisers")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds")
TRAIN_STEPS = flags.DEFINE_integer("train_steps", None, "Training steps, instead of the config's", lower_bound=1)
CPU_MINUTES = flags.DEFINE_float("cpu_minutes", None, "Process time to train for, instead of steps", 0.01)
NUM = flags.DEFINE_integer("num", None, "Samples to score [32768 points, 2000 images, fid 512]; files of folders", 2)
THREADS = flags.DEFINE_integer("threads", None, "Threads that torch may use", 1, 4096)
JSON = flags.DEFINE_string("json", None, "File for the records, written after each one; those in it are not run again")
PLOT = flags.DEFINE_string("plot", None, "PNG file for the scores against the number of steps, or of images")
WRITES = (JSON, PLOT)


def main() -> None:
    import torch
    from benchmarks.record_files import add_record, markdown, stored_records
    from benchmarks.speed import machine
    from benchmarks.suites import PLOTTED, RATED, SUITES, Arguments, plot

    from flowmaps.images import write_png

    if SUITE.value not in SUITES:
        raise UserError(f"--suite={SUITE.value or ''}: choose one of {', '.join(SUITES)}")
    try:
        seeds, rates = [int(seed) for seed in SEEDS.value], [float(rate) for rate in RATES.value]
    except ValueError:
        seeds, rates = [], []
    records_of, rows = SUITES[SUITE.value]
    rows = rows if ROWS.value is None else ROWS.value
    if not seeds or not rows:
        raise UserError(f"--seeds={','.join(SEEDS.value)} --rows={','.join(rows)}: give integers and rows")
    if (SUITE.value in RATED) != bool(rates) or not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--rates={','.join(RATES.value)}: positive numbers, only for --suite={', '.join(RATED)}")
    if PLOT.value and (SUITE.value not in PLOTTED or not PLOT.value.endswith(".png")):
        raise UserError(f"--plot={PLOT.value}: a .png file, for --suite={', '.join(PLOTTED)}")
    for name, file in (("json", JSON.value), ("plot", PLOT.value)):
        if file:
            with blame(name, file):
                check_new_file(Path(file))
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    budget: dict[str, Any] = {"train_steps": TRAIN_STEPS.value, "cpu_minutes": CPU_MINUTES.value, "num": NUM.value}
    records = stored_records(JSON.value, SUITE.value, budget) if JSON.value else []
    done = {(record["row"], record["seed"]) for record in records}
    where = machine()
    for record in records_of(Arguments(list(rows), seeds, **budget, rates=rates, done=done)):
        records.append({**record, "machine": where})
        if JSON.value:  # before it is printed, and together with what other processes have written there
            records = add_record(JSON.value, SUITE.value, budget, records[-1])
        print(json.dumps(json.loads(to_json(records[-1]))), flush=True)
    if PLOT.value:
        write_png(plot(records, SUITE.value), Path(PLOT.value))
    print(markdown(records, SUITE.value))


if __name__ == "__main__":
    run(sys.modules[__name__])
