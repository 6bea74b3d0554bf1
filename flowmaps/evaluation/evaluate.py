"""Score a model or images against a reference, with a record of every fact that moves the number."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, iterate
from flowmaps.distributed import ALONE, Team
from flowmaps.evaluation.paired import open_pairs
from flowmaps.evaluation.real_images import nearest_neighbours, open_images, seen_and_unseen, train_set_score
from flowmaps.evaluation.record import Record, Row, describe, ratios
from flowmaps.evaluation.references import Choice, Reference, model_size, open_floor, open_references
from flowmaps.evaluation.samples import sample_batches
from flowmaps.evaluation.scoring import floors, score
from flowmaps.evaluation.settings import Setting, sampling_settings
from flowmaps.generate import Interval, nfe
from flowmaps.images import to_uint8
from flowmaps.labels import BALANCED, RANDOM, class_number, label_policy_text, read_label_policy, sample_labels
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.features import POINTS
from flowmaps.metrics.frechet import check_comparable
from flowmaps.metrics.scores import (
    KID_SUBSET,
    check_metrics,
    check_reference,
    defined,
    distance_of,
    needs_reference_features,
)
from flowmaps.metrics.stored import pixels
from flowmaps.run_weights import load_weights
from samplers import Schedule

Weights = Callable[[], Mapping[str, Tensor]]


def evaluate(
    fm_or_images: FlowMap | Tensor | str | Path | DataSet,
    reference: str | Path | FeatureStats | Reference | Sequence[Reference],
    *,
    steps: int | Sequence[int] = (1,),
    num: int = 50_000,
    metrics: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    sampler: str | Sequence[str] | None = None,
    schedule: str | Schedule | Sequence[str | Schedule] = "stored",
    label: int | str | None = None,
    label_policy: str | Path = "balanced",
    guidance: float | None = None,
    guidance_interval: Interval = None,
    gamma: float = 1.0,
    batch: int = 500,
    extractor: Choice | Sequence[Choice] | None = None,
    weights: str | Path | None = None,
    floor: str | Path | None = None,
    pairs: str | Path | DataSet | None = None,
    lpips_weights: str = "",
    root: str | Path = "data",
    kid_subset: int = KID_SUBSET,
    memorisation: bool = False,
    errors: bool = False,
    averages: Mapping[float | None, Weights] | None = None,
    source: str = "",
    progress: bool = False,
    team: Team = ALONE,
    before_sampling: Callable[[Record], None] | None = None,
) -> Record:
    """Score a flow map's samples, or images, against a reference.

    Args:
        fm_or_images: A model, or images: uint8 [n, C, H, W] (points: float [n, dim]), a folder, zip or .npz, a data
            set or the name of one.
        reference: A data set ``NAME[:split]``, a folder or zip (cropped to a model's size as in training), a statistics
            file, statistics, or the result of ``open_reference`` or ``open_references``, which serves many calls.
        steps: One or several step counts; each gives a row of the record. Only a model needs ``steps`` to ``gamma``
            (except ``metrics``).
        num: Samples to score.
        metrics: ``"fid"`` on any features, on Inception's also ``"kid"``, ``"is"`` and ``"prc"``, on CLIP's ``"cmmd"``;
            ``"kl"`` for points. By default the distance alone.
        seeds: One sampling for each; sample i depends on (seed, i) alone. With several a row has the mean, half the
            range (``spread``) and each sampling's values (``repeats``).
        sampler: One or several of ``flowmaps.generate.SAMPLERS``; by default the one that the model was trained for.
        schedule: One or several time grids: ``"stored"`` in the checkpoint (else uniform), ``"uniform"``, a schedule
            file or a ``Schedule``.
        label: Class of all samples, by number or name; by default that of ``label_policy``.
        label_policy: How samples get their classes: ``"balanced"``, each as frequent as in the training data in any
            stretch of samples; ``"random"``, drawn with these probabilities by the seed; or a JSON file, a list with a
            class for each sample.
        guidance: Guidance weight; by default, as its times, that of the authors of a published map, or none.
        guidance_interval: Times between which it applies, for a model that takes them.
        gamma: Share of the noise that the sampler ``"stochastic"`` renews per step.
        batch: Samples at a time.
        extractor: One or several feature extractors, all of which see the same images; by default the reference's own.
            Each is a name, a file, a function or ``nn.Module``: see ``metrics.extractors.load_extractor``.
        weights: Weight file of the extractor, or a folder with those of several.
        floor: Real images that are not in the reference, such as a validation set, or their statistics. Their own
            distances are in the record, and the rows have the ratio of each distance to them (``FID ratio``).
        pairs: Images, a path or the name of a data set: sample i of a model with conditions is compared with image i,
            from the first again after the last. Rows then have ``PSNR`` in dB, and ``LPIPS`` with ``lpips_weights``,
            the folder of its weights.
        root: Folder of the data set's files.
        kid_subset: Images in each of KID's subsets.
        memorisation: Add the score of the training images (``floor``) and nearest-neighbour distances to each row; the
            reference must be a built-in data set of images, or the images of the training, with held-out ones as
            ``floor``.
        errors: Add to each row the standard error (``se``), the bias and the influence of blocks of samples on the
            Fréchet distance, which a gate compares. Keeps the features; from 100 samples on.
        averages: Weights to score in turn, by the decay of their average (None: raw weights). The model is left with
            the last ones.
        source: The model's or images' name in the record.
        progress: Show a progress bar on a terminal.
        team: The processes that share the work. All of them make the call; the first one returns the record, the
            others an empty one.
        before_sampling: Called with the record, whose rows have no scores yet, before anything is sampled; may raise.

    Returns:
        The record that ``fid.py --json`` writes: ``metric`` names the distance, ``results`` has a row per sampler,
        schedule and step count, and the rest is what the numbers depend on.

    Raises:
        UserError: An argument is wrong, the model or the images do not fit the reference, or a metric needs more.
        NotFinite: The model's samples hold NaN or infinity.

    Example:
        >>> fm = FlowMap.from_pretrained("assets/digits")
        >>> record = evaluate(fm, "digits:heldout", steps=(1, 2), num=500)
        >>> [(row["steps"], round(row["FD-digits"], 1)) for row in record["results"]]
        [(1, 0.8), (2, 0.8)]
    """
    # Everything that can be refused is refused before anything is sampled: keep this order.
    fm = fm_or_images if isinstance(fm_or_images, FlowMap) else None
    data = None if isinstance(fm_or_images, FlowMap) else open_images(fm_or_images, root, team)
    guided: dict[str, Any] = {"label": label, "guidance": guidance, "gamma": gamma}
    guided["guidance_interval"] = guidance_interval
    if fm is not None and guidance is None and guidance_interval is None:
        guided |= fm.info.usual_guidance()
    if interval := guided["guidance_interval"]:
        guided["guidance_interval"] = list(interval)  # as a record in a file has it
    settings: list[Setting] = []
    policy: str | Tensor = BALANCED
    if fm is not None:
        samplers = [fm.info.sampler] if sampler is None else _several(sampler)
        settings = sampling_settings(fm, _several(steps), samplers, _several(schedule), **guided)
        guided["label"] = None if label is None else class_number(fm.info, label)
        policy = read_label_policy(fm.info, label_policy, num, label)
        if not seeds:
            raise UserError("give at least one", field="seeds", value="()")
    references = _references(reference)
    if references and (extractor or weights):
        raise UserError("the Reference already has one: leave it out", field="extractor" if extractor else "weights")
    keep, size = needs_reference_features(metrics), model_size(fm) if fm else None
    if not references:
        assert isinstance(reference, str | Path | FeatureStats)
        chosen = [] if extractor is None else _several(extractor)
        references = open_references(reference, chosen, weights, root, keep=keep, size=size, team=team)
    num = num if data is None else len(data)
    shape = data.shape if data is not None else fm.info.shape if fm and not fm.info.latent_scale else ()
    check_metrics(metrics or defined((), references[0].extractor), [e.extractor for e in references], num, kid_subset)
    for each in references:
        if not defined(metrics, each.extractor):
            raise UserError(f"add one for the features of {each.extractor.name}, such as fid", field="metrics")
        _check(each, defined(metrics, each.extractor), num, shape, kid_subset, memorisation, team)
    paired = None if pairs is None else open_pairs(pairs, root, shape, num, lpips_weights, team)
    real = () if floor is None else open_floor(floor, references, root, keep=keep, size=size, team=team)
    first = references[0]
    known = seen_and_unseen(first.images, real[0].images if real else None, root) if memorisation else None
    record: Record = {}
    if not team.rank:  # the other processes have no reference
        facts = {"source": source or str(fm_or_images) * isinstance(fm_or_images, str | Path), "num": num}
        facts |= {"seeds": list(seeds), **guided} if fm else {"seeds": [], **dict.fromkeys(guided)}
        facts |= {"kid_subset": kid_subset} if "kid" in metrics else {}
        facts["label_policy"] = label_policy_text(policy) if fm else None
        if fm is not None and fm.conditions is not None:
            facts["condition"] = hashlib.sha256(fm.conditions.cpu().contiguous().numpy().tobytes()).hexdigest()
        record = describe(references, fm, facts)
        if before_sampling:
            before_sampling(record | {"results": _planned(fm, settings, averages)})
        if real:
            scored = floors(references, real, metrics, kid_subset)
            record["floor"] = {"source": str(floor), "n": real[0].stats.n, **scored}
    of_train = train_set_score(*known, first.extractor) if known and not team.rank else None
    if fm is None:
        assert data is not None
        samplings: Samplings = iter([({}, [(x for x, _ in iterate(data, team.split(num), batch))])])
    else:
        options = {**guided, "label_policy": policy, "batch": batch, "progress": progress}
        samplings = _samplings(fm, settings, averages, seeds, team.split(num), options)
    random = isinstance(policy, str) and policy == RANDOM  # other classes for another seed
    fixed = fm is not None and fm.info.num_classes > 0 and not random
    classes = sample_labels(fm.info, 0, num, 0, guided["label"], policy) if fm and fixed else None
    rows = []
    for row, shares in samplings:
        if memorisation:
            shares[0] = kept = list(shares[0])
        if paired:
            shares = [paired.watch(share) for share in shares]
        row |= score(shares, num, references, metrics, kid_subset, team, errors, classes)
        row |= ratios(row, record)
        row |= paired.scores(team) if paired else {}
        if memorisation:
            images = team.all_gather(torch.cat(kept))
            if known and not team.rank:
                found = nearest_neighbours(images, *known)
                row |= {"floor": of_train, **vars(found), "memorisation_ratio": found.ratio}
        rows.append(row)
    return {} if team.rank else record | {"results": rows}


def check_scorable(fm: FlowMap, reference: Reference, num: int) -> None:
    """Refuse a model of which ``reference`` could not score ``num`` samples by its distance, before any work."""
    shape = () if fm.info.latent_scale else fm.info.shape
    check_metrics([distance_of(reference.extractor)], [reference.extractor], num)
    _check(reference, [distance_of(reference.extractor)], num, shape, KID_SUBSET, False, ALONE)


def _references(reference: Any) -> tuple[Reference, ...]:
    """Return references that are open, or nothing."""
    if isinstance(reference, Reference):
        return (reference,)
    is_open = isinstance(reference, list | tuple) and all(isinstance(each, Reference) for each in reference)
    return tuple(reference) if is_open else ()


Samplings = Iterator[tuple[Row, list[Iterable[Tensor]]]]  # facts of a row, and for each seed this process's batches


def _several(choice: Any) -> list[Any]:
    return list(choice) if isinstance(choice, Sequence) and not isinstance(choice, str) else [choice]


def _check(
    reference: Reference,
    metrics: Sequence[str],
    num: int,
    shape: tuple[int, ...],
    kid_subset: int,
    memorisation: bool,
    team: Team,
) -> None:
    """Refuse ``num`` samples of ``shape`` (empty if not known yet) that could not be scored."""
    stats, extractor, _ = reference
    if shape:
        extractor.check_shape(shape)
    if not team.rank:
        origin = replace(extractor.origin, size=pixels(*shape[1:]) if len(shape) == 3 else "")
        check_comparable(FeatureStats(extractor.dim, origin), stats)
        check_reference(metrics, stats, kid_subset)
    if memorisation and extractor.origin.extractor == POINTS:
        raise UserError("only for images, not points", field="memorisation")


def _planned(
    fm: FlowMap | None, settings: Sequence[Setting], averages: Mapping[float | None, Weights] | None
) -> list[Row]:
    """Return the rows to come, without weights and scores."""
    if fm is None:
        return [{}]
    emas = averages or [fm.info.ema]
    return [{"ema": ema, "sampler": s.sampler, "grid": s.grid, "steps": s.steps} for ema in emas for s in settings]


def _samplings(
    fm: FlowMap,
    settings: Sequence[Setting],
    averages: Mapping[float | None, Weights] | None,
    seeds: Sequence[int],
    share: range,
    options: dict[str, Any],
) -> Samplings:
    """Yield the rows of a model; the batches of one are to be used before the next one is asked for."""
    for ema in averages or [fm.info.ema]:
        if averages:
            load_weights(fm.network, averages[ema]())
            fm.info = replace(fm.info, ema=ema)
        weights = fm.fingerprint()
        for way in settings:
            row: Row = {"ema": fm.info.ema, "sampler": way.sampler, "grid": way.grid, "steps": way.steps}
            evaluations = nfe(fm.info, way.sampler, way.steps, options["guidance"])
            row |= {"nfe": evaluations, "weights": weights, "times": way.times.tolist()}
            samples = (sample_batches(fm, way.times, share, seed, sampler=way.sampler, **options) for seed in seeds)
            yield row, [_finite(batches) for batches in samples]


def _finite(batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    """Yield points, or images rounded to uint8, up to the first batch with NaN or infinity.

    Stopping instead of raising lets ``score`` find too few samples in every process, and none waits for another.
    """
    for x, _ in batches:
        if not bool(torch.isfinite(x).all()):
            return
        yield to_uint8(x) if x.ndim == 4 else x
