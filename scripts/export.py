"""Write a run's model as a directory of its own, with any average of its weights.

python scripts/export.py --checkpoint=runs/digits --out=exported/digits
python scripts/export.py --checkpoint=runs/digits --ema=raw --out=exported/digits-raw
python scripts/export.py --checkpoint=runs/digits --ema=0.05 --out=exported/digits-narrow

The last one needs snapshots: a run with --config.ema_widths=0.05,0.1. It writes a diffusers pipeline directory.
"""

from dataclasses import replace

from absl import flags

from flowmaps import FlowMap, UserError
from flowmaps.files import writable_directory
from training import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, exported directory or hub id")
EMA = flags.DEFINE_string(
    "ema", None, "Weights of a run: the decay of an average, raw, or a width below 0.29 [what it exports]"
)
OUT = flags.DEFINE_string("out", None, "Directory to write; one that is there is replaced")


def main() -> None:
    from flowmaps.export import place
    from training.start import run_weights

    for name, value in (("checkpoint", CHECKPOINT.value), ("out", OUT.value)):
        if value is None:
            raise UserError(f"--{name} is missing: e.g. --checkpoint=runs/digits --out=exported/digits")
    out = place(OUT.value, "--out")
    fm = FlowMap.from_pretrained(CHECKPOINT.value)
    if EMA.value is not None:
        fm.network.load_state_dict(run_weights(CHECKPOINT.value, EMA.value, "--ema"))
        fm.info = replace(fm.info, ema=None if EMA.value == "raw" else float(EMA.value))
    writable_directory(out.parent, "--out")
    fm.save_pretrained(out)
    print(f"{out}: {fm.fingerprint()[:12]}, ema {fm.info.ema or 'none'}, {fm.info.images_seen} images seen")


if __name__ == "__main__":
    cli.run(main)
