"""Feature statistics of a data set or folder, the reference of fid.py.

python scripts/stats.py --data=digits:heldout --out=heldout.npz
python scripts/stats.py --data=my/images --size=64 --out=mine.npz --extractor=inception --weights=inception.pth
"""

from pathlib import Path

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.errors import blame
from flowmaps.files import check_new_file

DATA = flags.DEFINE_string("data", None, "Data set NAME[:split], folder, zip or .npz of images, hf:REPO or wds:SHARDS")
OUT = flags.DEFINE_string("out", None, "Statistics file to write, an .npz whatever its name")
EXTRACTORS = flags.DEFINE_list("extractors", [], "Names, files or module:function [the data set's own, else inception]")
flags.DEFINE_alias("extractor", "extractors")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor, or folder with those of several")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
DOWNLOAD = flags.DEFINE_bool("download", False, "Fetch the data set's files into --root first")
SIZE = flags.DEFINE_integer("size", None, "Crop and resize the images of a folder or zip to this", 1, 4096)
FIT = flags.DEFINE_enum("fit", "crop", ["crop", "pad"], "With --size: the central square, or padding to a square")
BACKGROUND = flags.DEFINE_enum(
    "background", "white", ["white", "black", "grey"], "Behind transparent pixels and around padded images"
)
FEATURES = flags.DEFINE_bool("features", False, "Also keep the features, for KID, precision and recall (large)")
SKIP_CORRUPT = flags.DEFINE_bool("skip_corrupt", False, "Leave out files that are not complete images")
READS, WRITES = (DATA, EXTRACTORS, WEIGHTS), (OUT,)


def main() -> None:
    data = required(DATA, "digits:heldout")
    out = Path(required(OUT, "heldout.npz"))

    from flowmaps.data import download
    from flowmaps.data.registry import check_source
    from flowmaps.distributed import pick_device, team
    from flowmaps.evaluation.real_images import built_in, cached_statistics, open_for_scoring
    from flowmaps.evaluation.references import load_extractors
    from flowmaps.metrics.extractors import check_extractors

    # Flags first, then the images, and the extractor last: its weights may have to be downloaded.
    with blame("data", data):
        check_source(data)
    with blame("out", out):
        check_new_file(out)
    check_extractors(EXTRACTORS.value, WEIGHTS.value)
    everyone = team()
    if DOWNLOAD.value and not everyone.rank:
        download(built_in(data) or data, ROOT.value)
    everyone.barrier()
    look = (SIZE.value, SKIP_CORRUPT.value, FIT.value, BACKGROUND.value)
    images = open_for_scoring(data, ROOT.value, *look, team=everyone)
    extractors = load_extractors(EXTRACTORS.value, WEIGHTS.value, data, pick_device(), images.shape)
    first, *others = cached_statistics(images, extractors, [FEATURES.value] * len(extractors), everyone)
    if not everyone.rank:
        first.save(out, others=others)
        made = ", ".join(f"{stats.dim} features of {stats.origin.extractor}" for stats in (first, *others))
        print(f"wrote    {out}: {first.n:,} samples of {data}, {made}")
        print(next_command.show(next_command.fid("RUN", str(out), [])))
