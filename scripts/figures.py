"""Draw the figures of the documents into a folder, as PNG files.

python scripts/figures.py
python scripts/figures.py --only=flow_map,quality --out=figures

Every figure is computed: from the checkpoints and records in assets/, or from a law whose drift is known exactly. Seeds
are fixed. All of them take about 20 seconds on one CPU core. Needs matplotlib.
"""

import sys
from pathlib import Path

from absl import flags

from flowmaps.cli.run import run
from flowmaps.errors import UserError, blame
from flowmaps.files import check_new_file

NAMES = ("flow_map", "objectives", "step_sizes", "quality")
ONLY = flags.DEFINE_list("only", list(NAMES), f"Figures to draw: {', '.join(NAMES)}")
OUT = flags.DEFINE_string("out", "assets/figures", "Folder for the files")
WRITES = (OUT,)


def main() -> None:
    if unknown := [name for name in ONLY.value if name not in NAMES]:
        raise UserError(f"--only={','.join(unknown)}: choose from {', '.join(NAMES)}")
    folder = Path(OUT.value)
    with blame("out", OUT.value):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ONLY.value:
            check_new_file(folder / f"{name}.png")
    import importlib

    from drawing.style import styled

    from flowmaps.evaluation.plots import picture
    from flowmaps.images import write_png

    for name in ONLY.value:
        with styled():
            write_png(picture(importlib.import_module(f"drawing.{name}").draw()), folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    run(sys.modules[__name__])
