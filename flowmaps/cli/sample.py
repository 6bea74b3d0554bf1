"""Sample from a checkpoint in few steps.

python scripts/sample.py --checkpoint=runs/digits --steps=1,2,4,8 --num=64 --seed=0 --out=samples
python scripts/sample.py --checkpoint=runs/digits --steps=64 --num=64 --out=samples --sampler=euler --label=3
python scripts/sample.py --checkpoint=assets/fashion_mnist --steps=1,2,4,8 --num=10 --out=samples --beside=euler
python scripts/sample.py --checkpoint=runs/digits --steps=8 --num=16 --out=samples --measurement=a.png --mask=hidden.png
python scripts/sample.py --checkpoint=runs/digits --steps=8 --num=16 --out=samples --reward=class:3 --reward_scale=10
python scripts/sample.py --checkpoint=runs/digits --steps=4 --out=samples --invert=a.png --label=3 --edit_label=8

Writes steps-N/000000.png ..., samples-N.npz (arr_0: uint8 [n, h, w, c], points float32 [n, dim]; label) and grid.png,
one row per step count; --beside adds the same noise carried by another sampler, on the right. A reward, a measurement
or a picture to invert is described by samples-N.npz too (record: JSON), and shown in the first row of grid.png.
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
from flowmaps.cli.steering_flags import SteeringFlags
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file, writable_directory

SAMPLING = SamplingFlags(num=64)
STEERING = SteeringFlags(SAMPLING)
OUT = flags.DEFINE_string("out", None, "Directory to write to")
BESIDE = flags.DEFINE_enum("beside", None, SAMPLER_NAMES, "Sampler to compare with in grid.png, in equal steps")
READS, WRITES = (*SAMPLING.reads, *STEERING.reads), (OUT,)


def main() -> None:
    directory = Path(required(OUT, "samples"))
    required(SAMPLING.checkpoint, "runs/digits")
    STEERING.check()
    special = STEERING.steers or STEERING.invert.value
    if special and BESIDE.value:
        raise UserError("compares samplers of a model alone: leave it out", "beside", BESIDE.value)

    import torch
    from torch import Tensor

    from flowmaps.evaluation.samples import PICTURES, sample_batches, write_samples
    from flowmaps.evaluation.settings import Setting, sampling_settings
    from flowmaps.evaluation.steered import rebuilt_batches, steered_batches
    from flowmaps.images import COLUMNS, hstack, sample_grid, to_pil, write_png
    from flowmaps.markdown import counted
    from flowmaps.run_weights import take_weights
    from samplers import Measurement

    counts = SAMPLING.counts()
    with blame("out", directory):
        out = writable_directory(directory)
        for count in counts:
            PICTURES.check(out / f"steps-{count}")
            check_new_file(out / f"samples-{count}.npz")
        check_new_file(out / "grid.png")
    fm = SAMPLING.load()
    settings = SAMPLING.settings(fm)
    reward, picture = STEERING.chosen_reward(fm), STEERING.picture(fm)
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

    def special_batches(setting: Setting, record: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        if picture is not None:
            return rebuilt_batches(fm, setting, picture, record)
        assert reward is not None
        how = {"batch": SAMPLING.batch.value, **guided}
        return steered_batches(fm, setting, num, SAMPLING.seed.value, reward, STEERING.particles.value, record, **how)

    num, rows = 1 if picture else SAMPLING.num.value, []
    for setting in settings:
        start, count, grid = time.perf_counter(), setting.steps, setting.grid
        record = {"checkpoint": SAMPLING.checkpoint.value, **STEERING.facts(guided)} if special else None
        made = batches(setting, num) if record is None else special_batches(setting, record)
        rows.append(write_samples(made, out, count, record))
        rate = num / (time.perf_counter() - start)
        sizes = {"stored": "stored step sizes", "uniform": "uniform steps"}.get(grid, f"step sizes of {grid}")
        how = [counted(count, "step"), setting.sampler, sizes]
        how += [f"{name} {guided[name]}" for name in ("label", "guidance") if guided[name] is not None]
        if interval := guided["guidance_interval"]:
            how[-1] += f" from {interval[0]:g} to {interval[1]:g}"
        show(f"samples  {', '.join(how)}: {num:,} {unit}, {rate:.3g} {unit}/s")
        if record is not None:
            show(f"record   {told(record)}")
    if picture is not None:
        rows.insert(0, picture[0])
    elif isinstance(reward, Measurement):
        rows.insert(0, reward.adjoint(reward.y).cpu() / reward.gain)
    shown = [rows]
    if others:
        count = len(shown[0][0][: COLUMNS if len(fm.info.shape) == 3 else None])
        shown.append([torch.cat([x.cpu() for x, _ in batches(setting, count)]) for setting in others])
    write_png(to_pil(hstack([sample_grid(rows) for rows in shown])), out / "grid.png")
    show(f"wrote    {out}/: grid.png, samples-N.npz" + (", steps-N/*.png" if unit == "images" else ""))
    if special:  # a score of these would not be the model's
        return
    show(next_command.show(next_command.fid(SAMPLING.checkpoint.value or "", fm.info.data, SAMPLING.typed())))


def told(record: dict[str, Any]) -> str:
    """Return the numbers of a record in words."""
    found = [f"{record['nfe']} network evaluations per sample"]
    if "ess" in record and record["particles"] > 1:
        found.append(f"effective particles {record['ess'][-1] * record['particles']:.1f} of {record['particles']}")
    names = {"seen_rms": "rms of what was measured", "rms": "rms of the picture rebuilt"}
    return ", ".join([*found, *(f"{words} {record[name]:.4f}" for name, words in names.items() if name in record)])
