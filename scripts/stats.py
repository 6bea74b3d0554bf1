"""Feature statistics of a data set or folder, the reference of fid.py.

python scripts/stats.py --data=digits:heldout --out=heldout.npz
python scripts/stats.py --data=my/images --out=mine.npz --extractor=inception --weights=inception.pth
"""

from pathlib import Path

from absl import flags

from flowmaps import UserError
from flowmaps.files import writable_file
from training import cli
from training.outputs import pick_device
from training.scoring import check_source, pick_extractor, source_stats

DATA = flags.DEFINE_string("data", None, "Data set NAME[:split], folder of images, or .npz of images")
OUT = flags.DEFINE_string("out", None, "Statistics file to write (.npz)")
EXTRACTOR = flags.DEFINE_string("extractor", None, "Feature extractor; by default the data set's own, else inception")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")


def main() -> None:
    for flag in (DATA, OUT):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing")
    check_source(DATA.value, "--data")
    out = writable_file(Path(OUT.value), "--out")
    extractor = pick_extractor(EXTRACTOR.value, WEIGHTS.value, DATA.value, pick_device())
    stats = source_stats(DATA.value, extractor, ROOT.value, "--data")
    stats.save(out)
    print(f"{out}: {stats.n} images of {DATA.value}, extractor {extractor.origin.extractor}, {stats.dim} features")


if __name__ == "__main__":
    cli.run(main)
