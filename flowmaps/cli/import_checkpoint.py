"""Turn a published checkpoint into an exported directory, without running anything in it.

python scripts/import_checkpoint.py --format=edm --src=edm-cifar10-32x32-cond-vp.pkl --out=teachers/edm
python scripts/sample.py --checkpoint=teachers/edm --sampler=heun --steps=18 --num=64 --out=samples

Formats: edm, edm2 (NVIDIA's .pkl), ect (ECT's and CMT's .pkl), dit, sit (facebookresearch's .pt), rectified_flow
(.pth), diffusers_unet and diffusers_dit (folders); and of maps, soflow, meanflow_sit, dmf, pmf (.pt), imf (.pth) and
tvm (.pkl).
Without --format the content decides. Some files do not say everything about their network; the options below do, and
are asked for where they are needed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required

if TYPE_CHECKING:
    from flowmaps.info import FlowMapInfo

FORMAT = flags.DEFINE_string(
    "format",
    None,
    "edm, edm2, ect, dit, sit, rectified_flow, diffusers_unet, diffusers_dit; of maps: soflow, meanflow_sit, dmf, imf, "
    "pmf, tvm [guessed from the content]",
)
SRC = flags.DEFINE_string("src", None, "The file, or for diffusers_unet and diffusers_dit the folder, as published")
OUT = flags.DEFINE_string("out", None, "Directory to write; an exported one is replaced")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Height and width: rectified_flow; diffusers_unet without sample_size; latents of an imf"
)
HEADS = flags.DEFINE_integer("heads", None, "Attention heads of a transformer, if they are not as published")
PREDICTION = flags.DEFINE_string(
    "prediction", None, "velocity, noise, data or score: what a sit or a model of diffusers predicts"
)
PATH = flags.DEFINE_string("path", None, "linear, trigonometric (SiT's GVP) or vp: the path that a sit was trained on")
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Weight that a published map was trained with, if it is not that of its authors"
)
DECOUPLED = flags.DEFINE_integer("decoupled", None, "Blocks of a dmf that know the start alone, if not as published")
BASE_STD = flags.DEFINE_float("base_std", None, "Deviation of the noise of a pmf, if not the published one of its size")
OPTIONS: tuple[flags.FlagHolder[Any], ...] = (IMAGE_SIZE, HEADS, PREDICTION, PATH, GUIDANCE, DECOUPLED, BASE_STD)
READS, WRITES = (SRC,), (OUT,)


def main() -> None:
    src, out = Path(required(SRC, "edm-cifar10-32x32-cond-vp.pkl")), required(OUT, "teachers/edm")
    from flowmaps.export import check_output
    from flowmaps.importers import check_options, guess_format, import_checkpoint

    given = {flag.name: flag.value for flag in OPTIONS}
    if FORMAT.value is not None:
        check_options(FORMAT.value, given)
    directory = check_output(out)
    form = FORMAT.value or guess_format(src)
    if FORMAT.value is None:
        print(f"format   {form}, as its content shows: --format={form}")
        check_options(form, given)
    fm = import_checkpoint(form, src, **given)
    fm.save_pretrained(directory)
    millions = sum(p.numel() for p in fm.network.parameters()) / 1e6
    low, high = fm.info.t_range
    facts = f"{type(fm.network).__name__}, {millions:.2f} million parameters, times {low:.4g} .. {high:.4g}"
    print(f"wrote    {out}: {facts}")
    if assumed := fm.info.origin.get("assumed"):
        print(f"assumed, since neither the file nor an option says it: {assumed}")
    if left := fm.info.origin.get("left out"):
        print(f"left out of the file: {left}")
    print(f"license: {fm.info.origin['license']}")
    solver = "heun" if fm.info.kind == "drift" else fm.info.sampler
    if fm.info.kind == "map":
        print(_recommended(fm.info))
    print(next_command.show(next_command.sample(out, solver)))


def _recommended(info: "FlowMapInfo") -> str:
    """Return a line on the sampling behind the figures of a map's authors."""
    how = "jumps with fresh noise between them (gamma 1)" if info.sampler == "stochastic" else "plain jumps"
    grid = "step sizes as stored" if info.schedules else "equal steps"
    line = f"sampled as by its authors: --sampler={info.sampler}, {how}, {grid}"
    if usual := info.usual_guidance():
        low, high = usual["guidance_interval"]
        line += f", --guidance={usual['guidance']:g} --guidance_interval={low:g},{high:g}"
    return line
