"""Turn a published checkpoint into an exported directory, without running anything in it.

python scripts/import_checkpoint.py --format=edm --src=edm-cifar10-32x32-cond-vp.pkl --out=teachers/edm
python scripts/sample.py --checkpoint=teachers/edm --sampler=heun --steps=18 --num=64 --out=samples

Formats: edm, edm2 (NVIDIA's .pkl), dit, sit (facebookresearch's .pt), rectified_flow (.pth), diffusers_unet (a folder).
"""

from pathlib import Path

from absl import flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError

FORMAT = flags.DEFINE_string("format", None, "edm, edm2, dit, sit, rectified_flow or diffusers_unet")
SRC = flags.DEFINE_string("src", None, "The file, or for diffusers_unet the folder, as published")
OUT = flags.DEFINE_string("out", None, "Directory to write; an exported one is replaced")
READS, WRITES = (SRC,), (OUT,)


def main() -> None:
    from flowmaps.export import check_output
    from flowmaps.importers import FORMATS, import_checkpoint

    if FORMAT.value is None:
        raise UserError(f"missing, choose one of {', '.join(FORMATS)}", field="format")
    src, out = Path(required(SRC, "edm-cifar10-32x32-cond-vp.pkl")), check_output(required(OUT, "teachers/edm"))
    fm = import_checkpoint(FORMAT.value, src)
    fm.save_pretrained(out)
    millions = sum(p.numel() for p in fm.network.parameters()) / 1e6
    low, high = fm.info.t_range
    print(f"{out}: {type(fm.network).__name__}, {millions:.2f} million parameters, times {low:.4g} .. {high:.4g}")
    print(f"license: {fm.info.origin['license']}")
