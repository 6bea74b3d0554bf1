"""Score samples against a reference: FID with Inception features, FD-<extractor> with others. Usable as a gate in CI.

python scripts/fid.py --checkpoint=runs/digits --reference=digits:heldout --steps=1,2,4,8 --num=2000 --memorisation
python scripts/fid.py --checkpoint=runs/digits --reference=heldout.npz --steps=1 --num=2000 --max_fid=9 --json=fid.json
python scripts/fid.py --samples=samples/samples-4.npz --reference=digits:heldout

Exit code: 0 scored (and below --max_fid), 1 above --max_fid, 2 cannot judge.
"""

import json
import sys
from pathlib import Path

import torch
from absl import flags

from flowmaps import UserError
from flowmaps.files import writable_file, write_file
from flowmaps.generate import nfe
from flowmaps.metrics import frechet_distance
from training import cli, scoring
from training.outputs import pick_device
from training.sampling_flags import SamplingFlags

SAMPLING = SamplingFlags(num=50_000)
SAMPLES = flags.DEFINE_string("samples", None, "Folder or .npz of images to score, instead of --checkpoint")
REFERENCE = flags.DEFINE_string("reference", None, "Data set NAME[:split], folder, or statistics file of stats.py")
EXTRACTOR = flags.DEFINE_string("extractor", None, "Feature extractor; by default the reference's own, else inception")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
MAX_FID = flags.DEFINE_float("max_fid", None, "Exit with 1 if any distance is above this")
JSON = flags.DEFINE_string("json", None, "File for the record")
MEMORISATION = flags.DEFINE_bool("memorisation", False, "Floor and nearest-neighbour distances (small data sets)")


def main() -> int:
    if (SAMPLING.checkpoint.value is None) == (SAMPLES.value is None):
        raise UserError("give either --checkpoint or --samples")
    if REFERENCE.value is None:
        raise UserError("--reference is missing: e.g. --reference=digits:heldout")
    if MEMORISATION.value and not scoring.is_data_set(REFERENCE.value):
        raise UserError("--memorisation needs a data set with a held-out split, e.g. --reference=digits:heldout")
    if JSON.value:
        writable_file(Path(JSON.value), "--json")
    fm = SAMPLING.load() if SAMPLING.checkpoint.value else None
    stats, extractor = scoring.reference_stats(
        REFERENCE.value, EXTRACTOR.value, WEIGHTS.value, ROOT.value, pick_device()
    )
    facts = {k: getattr(SAMPLING, k).value for k in ("seed", "sampler", "label", "guidance", "gamma")} if fm else {}
    facts |= {"source": SAMPLING.checkpoint.value or SAMPLES.value, "weights": fm.fingerprint() if fm else None}
    report = scoring.record(stats, extractor, fm, facts)
    data = REFERENCE.value.partition(":")[0]
    floor = scoring.floor(data, extractor, ROOT.value) if MEMORISATION.value else None
    for count in SAMPLING.counts() if fm else [None]:
        if fm is not None and count is not None:
            made = scoring.generated(SAMPLING.batches(fm, count))
            row = {"steps": count, "nfe": nfe(fm.info, SAMPLING.sampler.value, count, SAMPLING.guidance.value)}
            row["grid"] = SAMPLING.grid(fm, count)[0]
        else:
            made, row = scoring.image_batches(SAMPLES.value, ROOT.value, "--samples"), {}
        kept = list(made) if MEMORISATION.value else made
        ours = extractor.stats(kept)
        row |= {"num": ours.n, extractor.metric: frechet_distance(ours, stats)}
        if MEMORISATION.value:
            row |= {"floor": floor} | scoring.neighbours(torch.cat(list(kept)), data, ROOT.value)
        report["results"].append(row)
    print(scoring.table(report["results"]))
    if JSON.value:
        write_file(Path(JSON.value), json.dumps(report, indent=2).encode())
    worst = max(row[extractor.metric] for row in report["results"])
    if MAX_FID.value is not None and worst > MAX_FID.value:
        print(f"gate failed: {extractor.metric} {worst:.4g} is above --max_fid={MAX_FID.value:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
