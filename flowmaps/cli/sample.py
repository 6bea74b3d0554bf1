"""Sample from a checkpoint in few steps.

python scripts/sample.py --checkpoint=runs/digits --steps=1,2,4,8 --num=64 --seed=0 --out=samples
python scripts/sample.py --checkpoint=runs/digits --steps=64 --num=64 --out=samples --sampler=euler --label=3
python scripts/sample.py --checkpoint=assets/fashion_mnist --steps=1,2,4,8 --num=10 --out=samples --beside=euler

Writes steps-N/000000.png ..., samples-N.npz (uint8 [n, h, w, c] and labels; points: float32 [n, dim]) and grid.png, one
row per step count; with --beside the same noise by another sampler stands on its right side.
"""

from pathlib import Path

import torch
from absl import flags

from flowmaps import UserError
from flowmaps.cli.sampling_flags import SamplingFlags, Setting
from flowmaps.errors import blame
from flowmaps.evaluation.samples import write_samples
from flowmaps.files import writable_directory
from flowmaps.images import COLUMNS, hstack, sample_grid, to_pil
from samplers import SAMPLERS

SAMPLING = SamplingFlags(num=64)
OUT = flags.DEFINE_string("out", None, "Directory to write to")
BESIDE = flags.DEFINE_enum("beside", None, list(SAMPLERS), "Sampler to compare with in grid.png, in equal steps")


def main() -> None:
    if OUT.value is None:
        raise UserError("--out is missing: the directory to write to")
    ways = SAMPLING.settings()
    others = [Setting(BESIDE.value, "uniform", way.steps) for way in ways if BESIDE.value]
    fm = SAMPLING.load(others)
    with blame("out", OUT.value):
        out = writable_directory(Path(OUT.value))
    [fm] = SAMPLING.averages(fm)
    shown = [[write_samples(SAMPLING.batches(fm, way), out, way.steps) for way in ways]]
    if others:
        items = range(len(shown[0][0]))[: COLUMNS if len(fm.info.shape) == 3 else None]
        shown.append([torch.cat([x.cpu() for x, _ in SAMPLING.batches(fm, way, items=items)]) for way in others])
    to_pil(hstack([sample_grid(rows) for rows in shown])).save(out / "grid.png")
