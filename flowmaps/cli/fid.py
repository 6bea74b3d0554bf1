"""Score samples against a reference: FID with Inception features, FD-<extractor> with others. Usable as a gate in CI.

python scripts/fid.py --checkpoint=runs/digits --reference=digits:heldout --steps=1,2,4,8 --num=2000 --memorisation
python scripts/fid.py --checkpoint=runs/digits --reference=heldout.npz --steps=1 --num=2000 --max_fid=9 --json=fid.json
python scripts/fid.py --checkpoint=runs/cifar10 --reference=cifar10-train --metrics=fid,kid,is,prc --repeats=3
python scripts/fid.py --checkpoint=runs/mine --reference=my/images --steps=1,4 --num=5000
python scripts/fid.py --samples=samples/samples-4.npz --reference=digits:heldout

Exit code: 0 scored and within the limits, 1 a limit exceeded, 2 not scored.
"""

import os

from absl import flags

from flowmaps.cli.run import required
from flowmaps.cli.sampling_flags import SamplingFlags
from flowmaps.errors import UserError, blame

SAMPLING = SamplingFlags(num=50_000, several=True)
SAMPLES = flags.DEFINE_string("samples", None, "Folder or .npz of images to score, instead of --checkpoint")
REFERENCE = flags.DEFINE_string(
    "reference", None, "Data set NAME[:split], folder, hf:REPO, wds:SHARDS, or statistics (stats.py, ADM, EDM)"
)
EXTRACTOR = flags.DEFINE_string("extractor", None, "Its name or file; by default the reference's own, else inception")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
METRICS = flags.DEFINE_list("metrics", [], "fid; on inception also kid, is, prc; kl for points [fid, for points kl]")
KID = flags.DEFINE_integer("kid_subset", 1000, "Images in each of KID's subsets", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 1, "Samplings, with consecutive seeds: mean and spread", 1, 1000)
MAX_FID = flags.DEFINE_float("max_fid", None, "Exit with 1 if any distance is above this", lower_bound=0.0)
MAX_REGRESSION = flags.DEFINE_string("max_regression", None, "Exit with 1 if any distance is above that in this record")
TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "By how much: 0.05 is 5 percent, 1 is twice as much", 0.0, 1.0)
JSON = flags.DEFINE_string("json", None, "File for the record")
JUNIT = flags.DEFINE_string("junit", None, "File for the verdicts as JUnit XML")
MEMORISATION = flags.DEFINE_bool("memorisation", False, "Floor and nearest-neighbour distances (small data sets)")
READS, WRITES = (*SAMPLING.reads, SAMPLES, REFERENCE, EXTRACTOR, WEIGHTS, MAX_REGRESSION), (JSON, JUNIT)


def _check_idle_flags() -> None:
    """Refuse flags that would have no effect, most of all on a gate."""
    if SAMPLES.value:
        for flag in (*SAMPLING.all(), REPEATS):
            if flag.present and flag is not SAMPLING.batch:  # also of images that are read
                raise UserError("needs --checkpoint, not --samples: leave it out", flag.name, flag.value)
    if TOLERANCE.present and not MAX_REGRESSION.value:
        raise UserError("needs --max_regression: add it, or leave this out", "tolerance", TOLERANCE.value)
    if KID.present and "kid" not in METRICS.value:
        raise UserError("needs kid among --metrics: add it, or leave this out", "kid_subset", KID.value)


def main() -> int:
    # Cheap refusals come first, then those that open files, and all of them before anything is sampled.
    if (SAMPLING.checkpoint.value is None) == (SAMPLES.value is None):
        raise UserError("give either --checkpoint or --samples")
    reference = required(REFERENCE, "digits:heldout")
    _check_idle_flags()

    from flowmaps import FlowMap
    from flowmaps.data.registry import check_source
    from flowmaps.distributed import team
    from flowmaps.evaluation import evaluate, gate, open_reference
    from flowmaps.evaluation.references import built_in, model_size, open_images
    from flowmaps.metrics.extractors import check_extractor
    from flowmaps.metrics.scores import check_names, distance_of, needs_reference_features

    if MEMORISATION.value and not built_in(reference):
        raise UserError("--memorisation needs a data set with a held-out split, e.g. --reference=digits:heldout")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    gate.check_outputs(JSON.value, JUNIT.value, summary)
    check_extractor(EXTRACTOR.value, WEIGHTS.value)
    check_names(METRICS.value)
    for name, source in (("reference", reference), ("samples", SAMPLES.value)):
        if source:
            with blame(name, source):
                check_source(source)
    limits = gate.Limits.read(MAX_FID.value, MAX_REGRESSION.value, TOLERANCE.value)
    everyone, keep = team(), needs_reference_features(METRICS.value)
    images = open_images(SAMPLES.value, ROOT.value, everyone) if SAMPLES.value else SAMPLING.load()
    size = model_size(images) if isinstance(images, FlowMap) else None
    opened = open_reference(reference, EXTRACTOR.value, WEIGHTS.value, ROOT.value, keep=keep, size=size, team=everyone)
    distance = distance_of(opened.extractor)
    if (MAX_FID.value is not None or MAX_REGRESSION.value) and distance not in (METRICS.value or [distance]):
        raise UserError(f"--max_fid and --max_regression need {distance} among --metrics")
    record = evaluate(
        images,
        opened,
        steps=SAMPLING.counts(),
        num=SAMPLING.num.value,
        metrics=METRICS.value,
        seeds=range(SAMPLING.seed.value, SAMPLING.seed.value + REPEATS.value),
        sampler=SAMPLING.sampler.value,
        schedule=SAMPLING.schedule.value,
        label=SAMPLING.label.value,
        guidance=SAMPLING.guidance.value,
        guidance_interval=SAMPLING.interval(),
        gamma=SAMPLING.gamma.value,
        batch=SAMPLING.batch.value,
        root=ROOT.value,
        kid_subset=KID.value,
        memorisation=MEMORISATION.value,
        averages=SAMPLING.averages(),
        source=SAMPLES.value or SAMPLING.checkpoint.value or "",
        progress=True,
        team=everyone,
        before_sampling=limits.check,
    )
    return 0 if everyone.rank else gate.finish(record, limits, JSON.value, JUNIT.value, summary)
