"""Score samples against a reference: FID with Inception features, FD-<extractor> with others. Usable as a gate in CI.

python scripts/fid.py --checkpoint=runs/digits --reference=digits:heldout --steps=1,2,4,8 --num=2000 --memorisation
python scripts/fid.py --checkpoint=runs/digits --reference=heldout.npz --steps=1 --num=2000 --max_fid=9 --json=fid.json
python scripts/fid.py --checkpoint=runs/cifar10 --reference=cifar10-train --metrics=fid,kid,is,prc --repeats=3
python scripts/fid.py --samples=samples/samples-4.npz --reference=digits:heldout

Exit code: 0 scored (and within the limits), 1 a limit is passed, 2 cannot judge.
"""

import os
from pathlib import Path

import torch
from absl import flags

from flowmaps import UserError
from flowmaps.cli.sampling_flags import SamplingFlags
from flowmaps.cli.scored import Given, Model, Scored
from flowmaps.data.registry import builtin_name
from flowmaps.distributed import pick_device, team
from flowmaps.errors import blame
from flowmaps.evaluation import evaluate as scoring
from flowmaps.evaluation import gate
from flowmaps.evaluation.references import open_for_scoring, reference_stats
from flowmaps.files import writable_file
from flowmaps.metrics.extractors import POINTS
from flowmaps.metrics.scores import KID_SUBSET, distance_of, needs_reference_features

SAMPLING = SamplingFlags(num=50_000, several=True)
SAMPLES = flags.DEFINE_string("samples", None, "Folder or .npz of images to score, instead of --checkpoint")
REFERENCE = flags.DEFINE_string("reference", None, "Data set NAME[:split], folder, or statistics (stats.py, EDM, ADM)")
EXTRACTOR = flags.DEFINE_string("extractor", None, "Feature extractor; by default the reference's own, else inception")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
METRICS = flags.DEFINE_list("metrics", [], "fid; kid, is, prc too on inception; kl of points [fid, of points kl]")
KID = flags.DEFINE_integer("kid_subset", KID_SUBSET, "Images in each of KID's subsets", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 1, "Samplings, with seeds one after another: mean and spread", lower_bound=1)
MAX_FID = flags.DEFINE_float("max_fid", None, "Exit with 1 if any distance is above this")
MAX_REGRESSION = flags.DEFINE_string("max_regression", None, "Exit with 1 if any distance is above that in this record")
TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "By how much: 0.05 is 5 percent", lower_bound=0.0)
JSON = flags.DEFINE_string("json", None, "File for the record")
JUNIT = flags.DEFINE_string("junit", None, "File for the verdicts as JUnit XML")
MEMORISATION = flags.DEFINE_bool("memorisation", False, "Floor and nearest-neighbour distances (small data sets)")


def main() -> int:
    if (SAMPLING.checkpoint.value is None) == (SAMPLES.value is None):
        raise UserError("give either --checkpoint or --samples")
    if REFERENCE.value is None:
        raise UserError("--reference is missing: e.g. --reference=digits:heldout")
    known = builtin_name(REFERENCE.value)
    if MEMORISATION.value and not known:
        raise UserError("--memorisation needs a data set with a held-out split, e.g. --reference=digits:heldout")
    if SAMPLES.value and REPEATS.value > 1:
        raise UserError("--repeats needs --checkpoint")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    for flag, file in (("json", JSON.value), ("junit", JUNIT.value)):
        if file:
            with blame(flag, file):
                writable_file(Path(file))
    if summary:
        writable_file(Path(summary))
    limits = gate.Limits.read(MAX_FID.value, MAX_REGRESSION.value, TOLERANCE.value)
    everyone = team()
    fm = None if SAMPLES.value else SAMPLING.load()
    images = open_for_scoring(SAMPLES.value, ROOT.value, team=everyone) if SAMPLES.value else None
    scored: Scored = Model(SAMPLING, fm, REPEATS.value) if fm else Given(images, SAMPLES.value, SAMPLING.batch.value)
    wanted = REFERENCE.value, EXTRACTOR.value, WEIGHTS.value, ROOT.value
    reference, extractor = reference_stats(*wanted, pick_device(), needs_reference_features(METRICS.value), everyone)
    metrics = METRICS.value or [distance_of(extractor)]
    if (MAX_FID.value is not None or MAX_REGRESSION.value) and distance_of(extractor) not in metrics:
        raise UserError(f"--max_fid and --max_regression need {distance_of(extractor)} among --metrics")
    scorer = scoring.Scorer(extractor, reference, metrics, KID.value, everyone)
    scorer.check(scored.num, scored.shape)
    if MEMORISATION.value and extractor.origin.extractor == POINTS:
        raise UserError("--memorisation is for images")
    rows, report = [], {}
    if not everyone.rank:  # the others have no reference
        report = scoring.record(reference, extractor, fm, scored.facts()) | {"results": rows}
        limits.check(report, (row for row, _ in scored.samplings(everyone)))
    floor = scoring.floor(known[0], extractor, ROOT.value) if MEMORISATION.value else None
    for row, samplings in scored.samplings(everyone):
        if MEMORISATION.value:
            samplings[0] = list(samplings[0])
        row |= scorer(samplings)
        if MEMORISATION.value:
            kept = everyone.joined(torch.cat(samplings[0]))
            row |= {"floor": floor} | scoring.neighbours(kept, known[0], ROOT.value)
        rows.append(row)
    return 0 if everyone.rank else gate.conclude(report, limits, JSON.value, JUNIT.value, summary)
