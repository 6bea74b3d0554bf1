"""Sample from a checkpoint in few steps.

python scripts/sample.py --checkpoint=runs/digits --steps=1,2,4,8 --num=64 --seed=0 --out=samples
python scripts/sample.py --checkpoint=runs/digits --steps=64 --num=64 --out=samples --sampler=euler --label=3

Writes steps-N/000000.png ..., samples-N.npz (uint8 [n, h, w, c] and labels; points: float32 [n, dim]) and grid.png, one
row per step count.
"""

from pathlib import Path

from absl import flags

from flowmaps import FlowMap, UserError
from flowmaps.files import writable_directory
from flowmaps.generate import SAMPLERS, generate, labels_for
from samplers import uniform_times
from training import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Exported directory, run directory or hub id")
STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Step counts")
NUM = flags.DEFINE_integer("num", 64, "Samples for each step count", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Sample i depends on (seed, i) alone")
OUT = flags.DEFINE_string("out", None, "Directory to write to")
SAMPLER = flags.DEFINE_enum("sampler", "map", list(SAMPLERS), "map: jump; others integrate the drift")
LABEL = flags.DEFINE_integer("label", None, "Class of all samples; without it, sample i has class i mod classes")
GAMMA = flags.DEFINE_float("gamma", 1.0, "Share of noise that --sampler=stochastic renews at each step", 0.0, 1.0)
BATCH = flags.DEFINE_integer("batch", 500, "Samples at a time", lower_bound=1)


def main() -> None:
    from training.outputs import pick_device, write_samples

    for flag in (CHECKPOINT, OUT):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing")
    counts = cli.step_counts(STEPS.value)
    fm = FlowMap.from_pretrained(CHECKPOINT.value).to(pick_device())
    labels_for(fm.info, 1, LABEL.value)  # refuse a wrong label before anything is written
    results = {}
    for count in counts:
        batches = generate(
            fm,
            uniform_times(count),
            NUM.value,
            SEED.value,
            sampler=SAMPLER.value,
            label=LABEL.value,
            batch=BATCH.value,
        )
        results[count] = list(batches)
    write_samples(results, writable_directory(Path(OUT.value), "--out"))


if __name__ == "__main__":
    cli.run(main)
