"""Export a run's model, with any average of its weights, as a directory with a model card.

python scripts/export.py --checkpoint=runs/digits --out=exported/digits
python scripts/export.py --checkpoint=runs/digits --ema=0.05 --out=exported/digits-narrow
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --results=fid.json --how=recipe.md --license=mit
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --push_to_hub=somebody/digits

--ema=0.05 needs snapshots: a run with --config.ema_widths=0.05,0.1. It writes a diffusers pipeline directory.
"""

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, exported directory or hub id")
EMA = flags.DEFINE_string(
    "ema", None, "Weights of a run: the decay of an average, raw, or a width below 0.29 [what it exports]"
)
OUT = flags.DEFINE_string("out", None, "Directory to write; an exported one is replaced")
NAME = flags.DEFINE_string("name", None, "Name on the card, which its commands use [--push_to_hub, else --out]")
LICENSE = flags.DEFINE_string("license", "", "License of the weights, by its name on the hub: apache-2.0, mit, ...")
RESULTS = flags.DEFINE_list("results", [], "Records of fid.py --json for the card")
HOW = flags.DEFINE_string("how", None, "Markdown file on how the model was made, for the card")
HUB = flags.DEFINE_string("push_to_hub", None, "Hugging Face hub id to upload to, with the token of `hf auth login`")
PICTURE = flags.DEFINE_bool("picture", None, "Draw samples for the card [yes, except of imported weights and latents]")
READS, WRITES = (CHECKPOINT, HOW, RESULTS), (OUT,)


def main() -> None:
    checkpoint, target = required(CHECKPOINT, "runs/digits"), required(OUT, "exported/digits")

    from flowmaps.distributed import pick_device
    from flowmaps.evaluation.record import read_record
    from flowmaps.evaluation.samples import grid_image
    from flowmaps.export import check_output
    from flowmaps.flow_map import FlowMap
    from flowmaps.hub import check_upload, to_hub
    from flowmaps.images import png
    from flowmaps.model_card import card
    from flowmaps.reading import read_text
    from flowmaps.run_weights import take_weights

    out, records = check_output(target, checkpoint), []
    if HUB.value is not None:
        check_upload(HUB.value)
    for file in RESULTS.value:
        with blame("results", file):
            records.append(read_record(file))
    how = ""
    if HOW.value is not None:
        with blame("how", HOW.value):
            how = read_text(HOW.value, "give a Markdown file")
    fm = FlowMap.from_pretrained(checkpoint)
    if EMA.value is not None:
        take_weights(fm, checkpoint, EMA.value)
    weights = fm.fingerprint()
    for file, record in zip(RESULTS.value, records, strict=True):
        if any(row.get("weights") != weights for row in record["results"]):
            raise UserError(f"--results={file} was made with weights other than those to be exported: score them again")
    wanted = not (fm.info.origin or fm.info.latent_scale) if PICTURE.value is None else PICTURE.value
    counts = {"map": (1, 2, 4, 8), "euler": (4, 8, 16, 32), "stochastic": (1, 2, 4)}[fm.info.sampler] if wanted else ()
    picture = png(grid_image(fm.to(pick_device()), counts, seed=0, columns=8)) if wanted else b""
    name = NAME.value or HUB.value or target
    fm.save_pretrained(out, card(fm, name, LICENSE.value, records, how, counts), picture)
    print(f"wrote    {out}: {weights[:12]}, ema {fm.info.ema or 'none'}, {fm.info.images_seen:,} images seen")
    if HUB.value is not None:
        print(f"uploaded {to_hub(out, HUB.value)}")
    print(next_command.show(next_command.sample(str(out), fm.info.sampler)))
