"""Sample from a checkpoint in few steps.

python scripts/sample.py --checkpoint=runs/digits --steps=1,2,4,8 --num=64 --seed=0 --out=samples
python scripts/sample.py --checkpoint=runs/digits --steps=64 --num=64 --out=samples --sampler=euler --label=3

Writes steps-N/000000.png ..., samples-N.npz (uint8 [n, h, w, c] and labels; points: float32 [n, dim]) and grid.png, one
row per step count.
"""

from pathlib import Path

from absl import flags

from flowmaps import UserError
from flowmaps.files import writable_directory
from flowmaps.images import sample_grid, to_pil
from training import cli
from training.outputs import write_samples
from training.sampling_flags import SamplingFlags

SAMPLING = SamplingFlags(num=64)
OUT = flags.DEFINE_string("out", None, "Directory to write to")


def main() -> None:
    if OUT.value is None:
        raise UserError("--out is missing: the directory to write to")
    fm = SAMPLING.load()
    out = writable_directory(Path(OUT.value), "--out")
    [fm] = SAMPLING.averages(fm)
    rows = [write_samples(SAMPLING.batches(fm, way), out, way.steps) for way in SAMPLING.settings()]
    to_pil(sample_grid(rows)).save(out / "grid.png")


if __name__ == "__main__":
    cli.run(main)
