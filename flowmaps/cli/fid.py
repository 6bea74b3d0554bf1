"""Score samples against a reference: FID with Inception features, FD-<extractor> with others. Usable as a gate in CI.

python scripts/fid.py --checkpoint=runs/digits --reference=digits:heldout --steps=1,2,4,8 --num=2000 --memorisation
python scripts/fid.py --checkpoint=runs/digits --reference=heldout.npz --steps=1 --num=2000 --max_fid=9 --json=fid.json
python scripts/fid.py --checkpoint=runs/cifar10 --reference=cifar10-train --metrics=fid,kid,is,prc --repeats=3
python scripts/fid.py --checkpoint=runs/mine --reference=my/images --steps=1,4 --num=5000
python scripts/fid.py --checkpoint=runs/mine --reference=my/images --extractors=inception,dinov2 --weights=my/weights
python scripts/fid.py --samples=samples/samples-4.npz --reference=digits:heldout
python scripts/fid.py --from_record=fid.json

Exit code: 0 scored and within the limits, 1 a limit exceeded or a record not repeated, 2 not scored.
"""

import os
import sys
from typing import TYPE_CHECKING

from absl import flags

from flowmaps.cli.run import required
from flowmaps.cli.sampling_flags import SamplingFlags
from flowmaps.errors import UserError, blame

if TYPE_CHECKING:  # torch takes seconds to import
    from flowmaps.evaluation.record import Record

SAMPLING = SamplingFlags(num=50_000, several=True)
SAMPLES = flags.DEFINE_string("samples", None, "Folder or .npz of images to score, instead of --checkpoint")
REFERENCE = flags.DEFINE_string(
    "reference", None, "Data set NAME[:split], folder, hf:REPO, wds:SHARDS, or statistics (stats.py, EDM, ADM)"
)
EXTRACTORS = flags.DEFINE_list(
    "extractors", [], "Names, files or module:function; all see the same images [the reference's own, else inception]"
)
flags.DEFINE_alias("extractor", "extractors")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of the extractor, or folder with those of several")
FLOOR = flags.DEFINE_string(
    "floor", None, "Real images that are not in the reference: ratio of each distance to theirs"
)
PAIRS = flags.DEFINE_string("pairs", None, "True pictures of the samples of a model with --condition: PSNR to them")
LPIPS = flags.DEFINE_string("lpips_weights", None, "Folder of LPIPS's weights: with --pairs also that distance")
POLICY = flags.DEFINE_string("label_policy", "balanced", "Classes of the samples: balanced, random, or a JSON list")
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
METRICS = flags.DEFINE_list(
    "metrics", [], "fid; on inception also kid, is, prc, on clip-* cmmd; kl for points [fid, for points kl]"
)
KID = flags.DEFINE_integer("kid_subset", 1000, "Images in each of KID's subsets", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 1, "Samplings, with consecutive seeds: mean and spread", 1, 1000)
MAX_FID = flags.DEFINE_float("max_fid", None, "Exit with 1 if any distance is above this", lower_bound=0.0)
MAX_REGRESSION = flags.DEFINE_string("max_regression", None, "Exit with 1 if any distance is worse than in this record")
TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "By how much: 0.05 is 5 percent, 1 is twice as much", 0.0, 1.0)
CONFIDENCE = flags.DEFINE_float("confidence", 0.99, "Of the test that a worsening is significant", 0.5, 0.999999)
UPDATE = flags.DEFINE_bool("update_baseline", False, "Replace the record of --max_regression by this one: accept it")
JSON = flags.DEFINE_string("json", None, "File for the record")
JUNIT = flags.DEFINE_string("junit", None, "File for the verdicts as JUnit XML")
MARKDOWN = flags.DEFINE_string("markdown", None, "File for results and verdicts as Markdown, before and after")
FROM_RECORD = flags.DEFINE_string("from_record", None, "Repeat the evaluation of this record, say where it differs")
MEMORISATION = flags.DEFINE_bool("memorisation", False, "Floor and nearest-neighbour distances (small data sets)")
READS, WRITES = (
    [
        *SAMPLING.reads,
        POLICY,
        SAMPLES,
        REFERENCE,
        EXTRACTORS,
        WEIGHTS,
        FLOOR,
        PAIRS,
        LPIPS,
        MAX_REGRESSION,
        FROM_RECORD,
    ],
    (JSON, JUNIT, MARKDOWN),
)


def _check_idle_flags() -> None:
    """Refuse flags that would have no effect, most of all on a gate."""
    if SAMPLES.value:
        for flag in (*SAMPLING.all(), REPEATS, POLICY):
            if flag.present and flag is not SAMPLING.batch:  # also of images that are read
                raise UserError("needs --checkpoint, not --samples: leave it out", flag.name, flag.value)
    for flag in (TOLERANCE, CONFIDENCE, UPDATE):
        if flag.present and not MAX_REGRESSION.value:
            raise UserError("needs --max_regression: add it, or leave this out", flag.name, flag.value)
        if flag.present and flag is not UPDATE and UPDATE.value:
            raise UserError("has no effect with --update_baseline: leave it out", flag.name, flag.value)
    if KID.present and "kid" not in METRICS.value:
        raise UserError("needs kid among --metrics: add it, or leave this out", "kid_subset", KID.value)


# What a record cannot know about another machine; all else is as the record has it.
ELSEWHERE = "checkpoint samples reference extractors extractor weights floor root label_policy batch json".split()
ELSEWHERE += ["vae", "vae_batch", "vae_tiling", "condition", "pairs", "lpips_weights"]


def _as_recorded() -> "Record | None":
    """Set the flags to those of ``--from_record`` and return it, or None without one."""
    if not FROM_RECORD.value:
        return None
    from flowmaps.evaluation.record import read_record
    from flowmaps.evaluation.repeat import flags_of

    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]) + SAMPLING.all():
        if flag.present and flag.name not in (*ELSEWHERE, FROM_RECORD.name):
            raise UserError("is as --from_record has it: leave it out", flag.name, flag.value)
    with blame("from_record", FROM_RECORD.value):
        record = read_record(FROM_RECORD.value)
        given = flags_of(record)
    for name, value in given.items():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].parse(value)
    if record.get("representations") and "extractors" not in given and not EXTRACTORS.present:
        raise UserError("give them: --from_record has only their names", field="extractors")
    if (record["label_policy"] or "").startswith("sha256:") and not POLICY.present:
        raise UserError("give the file of the labels: --from_record has only its hash", field="label_policy")
    return record


def main() -> int:
    recorded = _as_recorded()
    # Cheap refusals come first, then those that open files, and all of them before anything is sampled.
    if (SAMPLING.checkpoint.value is None) == (SAMPLES.value is None):
        raise UserError("give either --checkpoint or --samples")
    reference = required(REFERENCE, "digits:heldout")
    _check_idle_flags()

    from flowmaps import FlowMap
    from flowmaps.data.registry import check_source
    from flowmaps.distributed import team
    from flowmaps.evaluation import evaluate, gate, open_references, repeat
    from flowmaps.evaluation.real_images import NO_SPLIT, built_in, open_images
    from flowmaps.evaluation.references import model_size
    from flowmaps.metrics.extractors import check_extractors
    from flowmaps.metrics.scores import check_names, distance_of, needs_reference_features

    if MEMORISATION.value and not (built_in(reference) or FLOOR.value):
        raise UserError(NO_SPLIT, field="memorisation")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    baseline, updated = (None, MAX_REGRESSION.value) if UPDATE.value else (MAX_REGRESSION.value, None)
    gate.check_outputs(JSON.value, JUNIT.value, summary, updated, MARKDOWN.value)
    check_extractors(EXTRACTORS.value, WEIGHTS.value)
    check_names(METRICS.value)
    for name, source in (("reference", reference), ("samples", SAMPLES.value), ("floor", FLOOR.value)):
        if source:
            with blame(name, source):
                check_source(source)
    limits = gate.Limits.read(MAX_FID.value, baseline, TOLERANCE.value, CONFIDENCE.value)
    everyone, keep = team(), needs_reference_features(METRICS.value)
    images = open_images(SAMPLES.value, ROOT.value, everyone) if SAMPLES.value else SAMPLING.load()
    size = model_size(images) if isinstance(images, FlowMap) else None
    chosen, weights = EXTRACTORS.value, WEIGHTS.value
    opened = open_references(reference, chosen, weights, ROOT.value, keep=keep, size=size, team=everyone)
    distance = distance_of(opened[0].extractor)
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
        label_policy=POLICY.value,
        guidance=SAMPLING.guidance.value,
        guidance_interval=SAMPLING.interval(),
        gamma=SAMPLING.gamma.value,
        batch=SAMPLING.batch.value,
        root=ROOT.value,
        kid_subset=KID.value,
        memorisation=MEMORISATION.value,
        floor=FLOOR.value,
        pairs=PAIRS.value,
        lpips_weights=LPIPS.value or "",
        errors=bool(JSON.value or MAX_REGRESSION.value),
        averages=SAMPLING.averages(),
        source=SAMPLES.value or SAMPLING.checkpoint.value or "",
        progress=True,
        team=everyone,
        before_sampling=limits.check,
    )
    if everyone.rank:
        return 0
    if recorded:
        return repeat.finish(recorded, record, FROM_RECORD.value or "", JSON.value)
    return gate.finish(record, limits, JSON.value, JUNIT.value, summary, updated, MARKDOWN.value)
