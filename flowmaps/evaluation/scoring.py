"""Score samplings: the mean of each score over seeds, its spread, and the error of the distance."""

import statistics
from collections.abc import Iterable, Sequence

from torch import Tensor

from flowmaps.distributed import Team, pick_device
from flowmaps.errors import UserError
from flowmaps.evaluation.record import Row
from flowmaps.evaluation.references import Reference
from flowmaps.metrics.influence import BLOCKS, distance_error
from flowmaps.metrics.scores import needs_features, scores


class NotFinite(UserError):
    """A model's samples hold NaN or infinity."""


def score(
    samplings: Sequence[Iterable[Tensor]],
    num: int,
    reference: Reference,
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
        reference, metrics, kid_subset: As ``metrics.scores.scores`` takes them.
        team: The processes that share the work. Only the first one gets scores.
        errors: Add the standard error, the bias and the blocks' influence of the Fréchet distance, if it is among the
            ``metrics`` and there are enough samples for it.
        labels: The samples' classes, if their shares are the same for every seed.

    Raises:
        NotFinite: There are fewer samples than ``num``.
    """
    found, errors = [], errors and "fid" in metrics and num >= BLOCKS
    several = []
    for share in samplings:
        mine = reference.extractor.stats(share, keep=errors or needs_features(metrics))
        stats = team.all_reduce_stats(mine)
        if stats.n != num:
            raise NotFinite("the model's samples hold NaN or infinity: nothing to score")
        if team.rank:
            continue
        found.append(scores(stats, reference.stats, reference.extractor, metrics, kid_subset, pick_device()))
        if errors:
            several.append(distance_error(stats, reference.stats, labels))
    if not found:
        return {}
    values = {name: [scored[name] for scored in found] for name in found[0]}
    row: Row = {name: statistics.mean(seeds) for name, seeds in values.items()}
    if len(found) > 1:
        row["spread"] = {name: (max(seeds) - min(seeds)) / 2 for name, seeds in values.items()}
        row["repeats"] = found
    if several:
        metric = reference.extractor.metric
        row["se"] = {metric: sum(error.se**2 for error in several) ** 0.5 / len(several)}
        row["bias"] = {metric: statistics.mean(error.bias for error in several)}
        row["influence"] = {metric: [error.influence for error in several]}
    return row
