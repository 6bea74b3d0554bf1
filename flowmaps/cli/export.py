"""Write a run's model as a directory of its own, with any average of its weights and a model card.

python scripts/export.py --checkpoint=runs/digits --out=exported/digits
python scripts/export.py --checkpoint=runs/digits --ema=0.05 --out=exported/digits-narrow
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --results=fid.json --how=recipe.md --license=mit
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --push_to_hub=somebody/digits

--ema=0.05 needs snapshots: a run with --config.ema_widths=0.05,0.1. It writes a diffusers pipeline directory.
"""

from pathlib import Path

from absl import flags

from flowmaps import FlowMap, UserError
from flowmaps.errors import blame
from flowmaps.files import writable_directory

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, exported directory or hub id")
EMA = flags.DEFINE_string(
    "ema", None, "Weights of a run: the decay of an average, raw, or a width below 0.29 [what it exports]"
)
OUT = flags.DEFINE_string("out", None, "Directory to write; an exported one that is there is replaced")
NAME = flags.DEFINE_string("name", None, "Name on the card, which its commands use [--push_to_hub, else --out]")
LICENSE = flags.DEFINE_string("license", "", "License of the weights, by the hub's name for it: apache-2.0, mit, ...")
RESULTS = flags.DEFINE_list("results", [], "Records of fid.py --json for the card")
HOW = flags.DEFINE_string("how", None, "Markdown file that says how the model was made, for the card")
HUB = flags.DEFINE_string("push_to_hub", None, "Hugging Face hub id to upload to, with the token of `hf auth login`")


def main() -> None:
    from flowmaps.evaluation.gate import read_record
    from flowmaps.export import check_output
    from flowmaps.model_card import card
    from flowmaps.run_weights import take_weights

    for name, value in (("checkpoint", CHECKPOINT.value), ("out", OUT.value)):
        if value is None:
            raise UserError(f"--{name} is missing: e.g. --checkpoint=runs/digits --out=exported/digits")
    out, records = check_output(OUT.value), [read_record(file, f"--results={file}") for file in RESULTS.value]
    if HOW.value is not None and not Path(HOW.value).is_file():
        raise UserError(f"--how={HOW.value}: no such file")
    how = Path(HOW.value).read_text() if HOW.value is not None else ""
    fm = FlowMap.from_pretrained(CHECKPOINT.value)
    if EMA.value is not None:
        take_weights(fm, CHECKPOINT.value, EMA.value)
    weights = fm.fingerprint()
    if wrong := [f for f, r in zip(RESULTS.value, records, strict=True) if _others(r, weights)]:
        raise UserError(f"--results={wrong[0]} is of other weights than those to be exported: score them again")
    with blame("out", out):
        writable_directory(out.parent)
    fm.save_pretrained(out, card(fm, NAME.value or HUB.value or OUT.value, LICENSE.value, records, how))
    print(f"{out}: {weights[:12]}, ema {fm.info.ema or 'none'}, {fm.info.images_seen} images seen")
    if HUB.value is not None:
        from flowmaps.hub import to_hub

        print(to_hub(out, HUB.value))


def _others(record: dict[str, object], weights: str) -> bool:
    results = record["results"]
    return isinstance(results, list) and any(row.get("weights") != weights for row in results)
