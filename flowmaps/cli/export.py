"""Export a run's model: as a directory with a model card, as graphs for other runtimes, as a web page or an app.

python scripts/export.py --checkpoint=runs/digits --out=exported/digits
python scripts/export.py --checkpoint=runs/digits --ema=0.05 --out=exported/digits-narrow
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --results=fid.json --how=recipe.md --license=mit
python scripts/export.py --checkpoint=runs/digits --out=exported/digits --push_to_hub=somebody/digits
python scripts/export.py --checkpoint=runs/digits --onnx=exported/digits-onnx --storage=float16
python scripts/export.py --checkpoint=runs/digits --torch_export=exported/digits-pt2
python scripts/export.py --checkpoint=runs/digits --web=exported/digits.html
python scripts/export.py --checkpoint=runs/digits --space=exported/digits-space

--ema=0.05 needs snapshots: a run with --config.ema_widths=0.05,0.1. --out is a diffusers pipeline directory. --onnx and
--torch_export write velocity (x, s, t, label), one_step (noise, label), of latents decoder, and flow_map.json.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame

if TYPE_CHECKING:
    from flowmaps.evaluation.record import Record
    from flowmaps.flow_map import FlowMap

STORAGE_NAMES = ["float32", "float16", "int8"]  # of flowmaps.deployment.onnx_files.STORAGE
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
ONNX = flags.DEFINE_string("onnx", None, "Directory for ONNX graphs")
STORAGE = flags.DEFINE_enum("storage", "float32", STORAGE_NAMES, "Type of the weights in ONNX graphs")
TORCH_EXPORT = flags.DEFINE_string("torch_export", None, "Directory for graphs that torch.export.load reads")
WEB = flags.DEFINE_string("web", None, "HTML file: a page that draws samples in the browser, without a server")
SPACE = flags.DEFINE_string("space", None, "Directory for a Hugging Face Space: an app with this model")
READS, WRITES = (CHECKPOINT, HOW, RESULTS), (OUT, ONNX, TORCH_EXPORT, WEB, SPACE)


def main() -> None:
    checkpoint = required(CHECKPOINT, "runs/digits")
    if not any(flag.value for flag in WRITES):
        required(OUT, "exported/digits")
    for flag in (HUB, HOW, PICTURE, RESULTS):
        if flag.present and OUT.value is None:
            raise UserError("needs --out, the directory with the card", field=flag.name, value=flag.value)
    if STORAGE.present and ONNX.value is None:
        raise UserError("needs --onnx", field="storage", value=STORAGE.value)
    _check_outputs(checkpoint)
    records, how = _of_card()

    from flowmaps.flow_map import FlowMap
    from flowmaps.run_weights import take_weights

    fm = FlowMap.from_pretrained(checkpoint)
    if EMA.value is not None:
        take_weights(fm, checkpoint, EMA.value)
    if WEB.value is not None:  # refusals first
        from flowmaps.deployment.page import check_page

        with blame("web", WEB.value):
            check_page(fm)
    if OUT.value is not None:
        _directory(fm, Path(OUT.value), records, how)
    if ONNX.value is not None or TORCH_EXPORT.value is not None:
        _graphs(fm)
    if WEB.value is not None:
        from flowmaps.deployment.page import write_page

        with blame("web", WEB.value):
            size = write_page(fm, Path(WEB.value), NAME.value or "")
        print(f"wrote    {WEB.value}: {size / 1e6:.2f} MB, open it in a browser")
    if SPACE.value is not None:
        from flowmaps.deployment.space import write_space

        write_space(fm, Path(SPACE.value), NAME.value or Path(SPACE.value).resolve().name, LICENSE.value)
        print(f"wrote    {SPACE.value}: python {SPACE.value}/app.py runs it here")


def _check_outputs(checkpoint: str) -> None:
    """Refuse, before any work, what cannot be written."""
    from flowmaps.deployment.graphs import GRAPHS
    from flowmaps.deployment.onnx_files import check_installed
    from flowmaps.deployment.space import SPACES
    from flowmaps.export import check_output
    from flowmaps.files import check_new_file, writable_directory
    from flowmaps.hub import check_upload

    if OUT.value is not None:
        check_output(OUT.value, checkpoint)
    if HUB.value is not None:
        check_upload(HUB.value)
    if ONNX.value is not None:
        check_installed()
    for flag, layout in ((ONNX, GRAPHS), (TORCH_EXPORT, GRAPHS), (SPACE, SPACES)):
        if flag.value is not None:
            with blame(flag.name, flag.value):
                layout.check(Path(flag.value))
                writable_directory(Path(flag.value))
    if WEB.value is not None:
        with blame("web", WEB.value):
            if not WEB.value.endswith(".html"):
                raise UserError("must end in .html, the format that is written")
            check_new_file(Path(WEB.value))


def _of_card() -> "tuple[list[Record], str]":
    """Return the records of --results and the text of --how."""
    from flowmaps.evaluation.record import read_record
    from flowmaps.reading import read_text

    records = []
    for file in RESULTS.value:
        with blame("results", file):
            records.append(read_record(file))
    if HOW.value is None:
        return records, ""
    with blame("how", HOW.value):
        return records, read_text(HOW.value, "give a Markdown file")


def _directory(fm: "FlowMap", out: Path, records: "list[Record]", how: str) -> None:
    """Write --out, and upload it on request."""
    from flowmaps.distributed import pick_device
    from flowmaps.evaluation.samples import grid_image
    from flowmaps.hub import to_hub
    from flowmaps.images import png
    from flowmaps.model_card import card

    weights = fm.fingerprint()
    for file, record in zip(RESULTS.value, records, strict=True):
        if any(row.get("weights") != weights for row in record["results"]):
            raise UserError(f"--results={file} was made with weights other than those to be exported: score them again")
    wanted = not (fm.info.origin or fm.info.latent_scale) if PICTURE.value is None else PICTURE.value
    counts = {"map": (1, 2, 4, 8), "euler": (4, 8, 16, 32), "stochastic": (1, 2, 4)}[fm.info.sampler] if wanted else ()
    picture = png(grid_image(fm.to(pick_device()), counts, seed=0, columns=8)) if wanted else b""
    name = NAME.value or HUB.value or str(OUT.value)
    fm.save_pretrained(out, card(fm, name, LICENSE.value, records, how, counts), picture)
    print(f"wrote    {out}: {weights[:12]}, ema {fm.info.ema or 'none'}, {fm.info.images_seen:,} images seen")
    if HUB.value is not None:
        print(f"uploaded {to_hub(out, HUB.value)}")
    print(next_command.show(next_command.sample(str(out), fm.info.sampler)))
    fm.cpu()


def _graphs(fm: "FlowMap") -> None:
    """Write --onnx and --torch_export."""
    from functools import partial

    from flowmaps.deployment.graphs import write_graphs, write_pt2
    from flowmaps.deployment.onnx_files import write_onnx

    for flag, ending, write in (
        (ONNX, "onnx", partial(write_onnx, storage=STORAGE.value)),
        (TORCH_EXPORT, "pt2", write_pt2),
    ):
        if flag.value is not None:
            with blame(flag.name, flag.value):
                for line in write_graphs(fm, Path(flag.value), ending, write):
                    print(f"wrote    {flag.value}/{line}", flush=True)
