"""The experiments behind the tables in README and docs.

python scripts/benchmark.py --suite=checkerboard --seeds=0,1,2 --cpu_minutes=2 --json=checkerboard.json
python scripts/benchmark.py --suite=digits --rows=lagrangian --seeds=0,1,2 --json=digits.json
python scripts/benchmark.py --suite=step --threads=1
python scripts/benchmark.py --suite=cost --threads=1

Prints a Markdown table (mean over seeds ± half the range). KL@n, W2@n, map@n and euler@n are at n sampling steps.
"""

import json
import platform
from pathlib import Path

import torch
from absl import flags

from flowmaps import UserError
from flowmaps.files import writable_file, write_file
from training import cli

SUITE = flags.DEFINE_string(
    "suite", None, "checkerboard, digits, step (time of a training step) or cost (of each objective)"
)
ROWS = flags.DEFINE_list("rows", ["flow_matching", "lagrangian"], "Rows of the suite's config")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds")
TRAIN_STEPS = flags.DEFINE_integer("train_steps", None, "Training steps, instead of the config's", lower_bound=1)
CPU_MINUTES = flags.DEFINE_float("cpu_minutes", None, "Process time to train for, instead of steps", 0.01)
NUM = flags.DEFINE_integer("num", None, "Samples to score: 32768 points or 2000 images by default", lower_bound=2)
THREADS = flags.DEFINE_integer("threads", None, "Threads that torch may use", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File for the records, written after each one")


def main() -> None:
    from training.benchmark import markdown, run

    if SUITE.value is None:
        raise UserError("--suite is missing: checkerboard, digits, step or cost")
    if not all(seed.lstrip("-").isdigit() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: give whole numbers")
    if JSON.value:
        writable_file(Path(JSON.value), "--json")
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    records = []
    seeds = [int(seed) for seed in SEEDS.value]
    for record in run(SUITE.value, ROWS.value, seeds, TRAIN_STEPS.value, CPU_MINUTES.value, NUM.value):
        records.append(record)
        print(json.dumps(record), flush=True)
        if JSON.value:
            content = {"suite": SUITE.value, "machine": machine, "records": records}
            write_file(Path(JSON.value), json.dumps(content, indent=2).encode())
    print(markdown(records))


if __name__ == "__main__":
    cli.run(main)
