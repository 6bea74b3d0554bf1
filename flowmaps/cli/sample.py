"""Sample from a checkpoint in few steps.

python scripts/sample.py --checkpoint=runs/digits --steps=1,2,4,8 --num=64 --seed=0 --out=samples
python scripts/sample.py --checkpoint=runs/digits --steps=64 --num=64 --out=samples --sampler=euler --label=3
python scripts/sample.py --checkpoint=assets/fashion_mnist --steps=1,2,4,8 --num=10 --out=samples --beside=euler

Writes steps-N/000000.png ..., samples-N.npz (arr_0: uint8 [n, h, w, c], points float32 [n, dim]; label) and grid.png,
one row per step count; --beside adds the same noise carried by another sampler, on the right.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.cli.sampling_flags import SAMPLER_NAMES, SamplingFlags
from flowmaps.errors import blame
from flowmaps.files import check_new_file, writable_directory

SAMPLING = SamplingFlags(num=64)
OUT = flags.DEFINE_string("out", None, "Directory to write to")
BESIDE = flags.DEFINE_enum("beside", None, SAMPLER_NAMES, "Sampler to compare with in grid.png, in equal steps")
READS, WRITES = SAMPLING.reads, (OUT,)


def main() -> None:
    directory = Path(required(OUT, "samples"))
    required(SAMPLING.checkpoint, "runs/digits")

    import torch
    from torch import Tensor

    from flowmaps.evaluation.samples import PICTURES, sample_batches, write_samples
    from flowmaps.evaluation.settings import Setting, sampling_settings
    from flowmaps.images import COLUMNS, hstack, sample_grid, to_pil, write_png
    from flowmaps.markdown import counted
    from flowmaps.run_weights import take_weights

    counts = SAMPLING.counts()
    with blame("out", directory):
        out = writable_directory(directory)
        for count in counts:
            PICTURES.check(out / f"steps-{count}")
            check_new_file(out / f"samples-{count}.npz")
        check_new_file(out / "grid.png")
    fm = SAMPLING.load()
    settings = SAMPLING.settings(fm)
    guided: dict[str, Any] = {name: getattr(SAMPLING, name).value for name in ("label", "guidance", "gamma")}
    guided["guidance_interval"] = SAMPLING.interval()
    others = []
    if BESIDE.value:
        others = sampling_settings(fm, counts, [BESIDE.value], ["uniform"], **guided)
    for ema in SAMPLING.ema.value:  # at most one
        take_weights(fm, SAMPLING.checkpoint.value or "", ema)

    show = partial(print, flush=True)
    ema = SAMPLING.ema.value[0] if SAMPLING.ema.value else str(fm.info.ema or "none")
    unit = "images" if len(fm.info.shape) == 3 else "points"
    what = f"{'latents' if fm.info.latent_scale else unit} of {' x '.join(map(str, fm.info.shape))}"
    show(f"model    {SAMPLING.checkpoint.value}: a {fm.info.kind} of {what}, ema {ema}, seed {SAMPLING.seed.value}")

    def batches(setting: Setting, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        options = {"sampler": setting.sampler, "batch": SAMPLING.batch.value, **guided}
        return sample_batches(fm, setting.times, range(count), SAMPLING.seed.value, progress=True, **options)

    num, rows = SAMPLING.num.value, []
    for setting in settings:
        start, count, grid = time.perf_counter(), setting.steps, setting.grid
        rows.append(write_samples(batches(setting, num), out, count))
        rate = num / (time.perf_counter() - start)
        sizes = {"stored": "stored step sizes", "uniform": "uniform steps"}.get(grid, f"step sizes of {grid}")
        how = [counted(count, "step"), setting.sampler, sizes]
        how += [f"{name} {guided[name]}" for name in ("label", "guidance") if guided[name] is not None]
        if interval := guided["guidance_interval"]:
            how[-1] += f" from {interval[0]:g} to {interval[1]:g}"
        show(f"samples  {', '.join(how)}: {num:,} {unit}, {rate:.3g} {unit}/s")
    shown = [rows]
    if others:
        count = len(shown[0][0][: COLUMNS if len(fm.info.shape) == 3 else None])
        shown.append([torch.cat([x.cpu() for x, _ in batches(setting, count)]) for setting in others])
    write_png(to_pil(hstack([sample_grid(rows) for rows in shown])), out / "grid.png")
    show(f"wrote    {out}/: grid.png, samples-N.npz" + (", steps-N/*.png" if unit == "images" else ""))
    show(next_command.show(next_command.fid(SAMPLING.checkpoint.value or "", fm.info.data, SAMPLING.typed())))
