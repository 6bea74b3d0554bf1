"""Score samplings: the mean of each score over seeds, its spread, and the error of the distance."""

import statistics
from collections.abc import Iterable, Sequence

from torch import Tensor

from flowmaps.distributed import Team, pick_device
from flowmaps.errors import UserError
from flowmaps.evaluation.record import Row
from flowmaps.evaluation.references import Reference
from flowmaps.metrics.features import extract
from flowmaps.metrics.influence import BLOCKS, DistanceError, distance_error
from flowmaps.metrics.scores import METRICS, defined, needs_features, scores


class NotFinite(UserError):
    """A model's samples hold NaN or infinity."""


def score(
    samplings: Sequence[Iterable[Tensor]],
    num: int,
    references: Sequence[Reference],
    metrics: Sequence[str],
    kid_subset: int,
    team: Team,
    errors: bool = False,
    labels: Tensor | None = None,
) -> Row:
    """Return the mean of each score over samplings, and their spread and values if there are several.

    Args:
        samplings: For each seed this process's share of uint8 image batches.
        num: Samples of all processes.
        references: What they are compared with, by one or several extractors, which all see the same images.
        metrics: Those of each extractor are the ones that are ``defined`` on its features.
        kid_subset: As ``metrics.scores.scores`` takes it.
        team: The processes that share the work. Only the first one gets scores.
        errors: Add the standard error, the bias and the blocks' influence of the Fréchet distances, if they are among
            the ``metrics`` and there are enough samples for it.
        labels: The samples' classes, if their shares are the same for every seed.

    Raises:
        NotFinite: There are fewer samples than ``num``.
    """
    extractors = [reference.extractor for reference in references]
    own = [defined(metrics, extractor) for extractor in extractors]
    errors = errors and num >= BLOCKS
    found: list[dict[str, float]] = []
    uncertain: dict[str, list[DistanceError]] = {}
    for share in samplings:
        keep = [needs_features(names) or (errors and "fid" in names) for names in own]
        statistics_of = [team.all_reduce_stats(stats) for stats in extract(extractors, share, keep)]
        if statistics_of[0].n != num:
            raise NotFinite("the model's samples hold NaN or infinity: nothing to score")
        if team.rank:
            continue
        found.append({})
        for stats, reference, names in zip(statistics_of, references, own, strict=True):
            found[-1] |= scores(stats, reference.stats, reference.extractor, names, kid_subset, pick_device())
            if errors and "fid" in names:
                error = distance_error(stats, reference.stats, labels)
                uncertain.setdefault(reference.extractor.metric, []).append(error)
    if not found:
        return {}
    values = {name: [scored[name] for scored in found] for name in found[0]}
    row: Row = {name: statistics.mean(seeds) for name, seeds in values.items()}
    if len(found) > 1:
        row["spread"] = {name: (max(seeds) - min(seeds)) / 2 for name, seeds in values.items()}
        row["repeats"] = found
    if uncertain:
        row["se"] = {name: sum(e.se**2 for e in seeds) ** 0.5 / len(seeds) for name, seeds in uncertain.items()}
        row["bias"] = {name: statistics.mean(e.bias for e in seeds) for name, seeds in uncertain.items()}
        row["influence"] = {name: [e.influence for e in seeds] for name, seeds in uncertain.items()}
    return row


def floors(references: Sequence[Reference], real: Sequence[Reference], metrics: Sequence[str], kid_subset: int) -> Row:
    """Return the scores of real images that are not in the reference, as far as they are distances."""
    found: Row = {}
    for reference, own in zip(references, real, strict=True):
        names = [name for name in defined(metrics, reference.extractor) if METRICS[name].distance]
        found |= scores(own.stats, reference.stats, reference.extractor, names, kid_subset, pick_device())
    return {name: value for name, value in found.items() if not name.endswith(" std")}
