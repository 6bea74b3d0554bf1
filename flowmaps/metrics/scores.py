"""Metrics of a set of samples from one pass over them: all are functions of the same features.

Metrics that compare single images need the features themselves (``FeatureStats(keep=True)``). KID, the Inception Score,
precision and recall are defined on Inception features only; torch-fidelity's functions compute them, at its settings.
"""

from collections.abc import Sequence

import torch

from flowmaps.errors import UserError
from flowmaps.metrics.extractors import POINTS, Extractor
from flowmaps.metrics.points import board_kl
from flowmaps.metrics.stats import FeatureStats, check_comparable, frechet_distance

METRICS = {
    "fid": "Fréchet distance of the features' Gaussians (Heusel et al. 2017, arXiv 1706.08500); lower is better",
    "kid": "squared MMD, cubic kernel, mean and deviation over subsets (Binkowski et al. 2018, arXiv 1801.01401)",
    "is": "Inception Score, mean and deviation over 10 splits (Salimans et al. 2016, arXiv 1606.03498)",
    "prc": "precision and recall by 3 nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991)",
}
KL = "kl"  # the only metric of points: KL(data || model) on a grid (flowmaps.metrics.board_kl)
KID_SUBSETS, KID_SUBSET = 100, 1000
SEED = 2020  # of KID's subsets and of the Inception Score's splits
NEIGHBOURS = 3
SPLITS = 10


def distance_of(extractor: Extractor) -> str:
    """Return the metric that ``extractor.metric`` names, which a gate judges."""
    return KL if extractor.origin.extractor == POINTS else "fid"


def needs_features(metrics: Sequence[str]) -> bool:
    """Tell whether ``metrics`` need the samples' features besides their moments."""
    return bool({"kid", "is", "prc", KL} & set(metrics))


def needs_reference_features(metrics: Sequence[str]) -> bool:
    """Tell whether ``metrics`` need the reference's features besides its moments."""
    return bool({"kid", "prc"} & set(metrics))


def check_metrics(metrics: Sequence[str], extractor: Extractor, num: int, kid_subset: int = KID_SUBSET) -> None:
    """Refuse metrics that ``num`` images and this extractor cannot give."""
    given = ",".join(metrics)
    if not metrics or len(set(metrics)) < len(metrics) or not set(metrics) <= {*METRICS, KL}:
        raise UserError(f"give different ones of {', '.join([*METRICS, KL])}", field="metrics", value=given)
    only, name = distance_of(extractor), extractor.origin.extractor
    if extractor.logits is None and set(metrics) != {only}:
        raise UserError(
            f"only {only} is defined on the features of {name}, the others need extractor=inception",
            field="metrics",
            value=given,
        )
    if extractor.logits is not None and KL in metrics:
        raise UserError(f"kl is for points, the extractor {name} for images", field="metrics", value=given)
    least = {"fid": 2, "kid": kid_subset, "is": SPLITS, "prc": NEIGHBOURS + 1, KL: 2}
    for name in metrics:
        if num < least[name]:
            remedy = "give more, or a smaller kid_subset" if name == "kid" else "give more"
            raise UserError(f"needs {least[name]} images, there are {num}: {remedy}", field="metrics", value=name)


def check_reference(metrics: Sequence[str], reference: FeatureStats, kid_subset: int = KID_SUBSET) -> None:
    """Refuse a reference that lacks what the ``metrics`` need."""
    if not needs_reference_features(metrics):
        return
    if reference.features is None:
        raise UserError(
            "these compare single images, but the reference has only moments: give images, or statistics with features "
            "(stats.py --features)",
            field="metrics",
            value=",".join(metrics),
        )
    if "kid" in metrics and len(reference.features) < kid_subset:
        count = len(reference.features)
        raise UserError(f"the reference has only {count} images: at most {count}", field="kid_subset", value=kid_subset)


def scores(
    ours: FeatureStats,
    reference: FeatureStats,
    extractor: Extractor,
    metrics: Sequence[str] = ("fid",),
    kid_subset: int = KID_SUBSET,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute the ``metrics`` of samples from their features.

    Args:
        ours: Statistics of the samples' features; kept features where ``needs_features``.
        reference: Statistics of the reference's features, from the same extractor.
        extractor: The extractor of both.
        metrics: Keys of ``METRICS``, or ``"kl"`` for points.
        kid_subset: Images in each of KID's subsets.
        device: Where the nearest neighbours of precision and recall are found.

    Returns:
        Values by the names under which they are reported: ``FID``, ``KID``, ``KID std``, ...

    Raises:
        UserError: A set lacks what a metric needs, or the two are not comparable.
    """
    check_metrics(metrics, extractor, ours.n or 0, kid_subset)
    check_reference(metrics, reference, kid_subset)
    check_comparable(ours, reference)
    found: dict[str, float] = {}
    if "fid" in metrics:
        found[extractor.metric] = frechet_distance(ours, reference)
    features, real = (torch.empty(0) if stats.features is None else stats.features for stats in (ours, reference))
    if needs_features(metrics) and not len(features):
        raise ValueError("these metrics need the features: use FeatureStats(keep=True)")
    if KL in metrics:
        found[extractor.metric] = board_kl(features)
    if "kid" in metrics:
        from torch_fidelity.metric_kid import kid_features_to_metric

        kid = kid_features_to_metric(
            features, real, kid_subsets=KID_SUBSETS, kid_subset_size=kid_subset, rng_seed=SEED, verbose=False
        )
        found |= {"KID": kid["kernel_inception_distance_mean"], "KID std": kid["kernel_inception_distance_std"]}
    if "is" in metrics and extractor.logits is not None:
        from torch_fidelity.metric_isc import isc_features_to_metric

        isc = isc_features_to_metric(extractor.logits(features).cpu(), splits=SPLITS, shuffle=True, rng_seed=SEED)
        found |= {"IS": isc["inception_score_mean"], "IS std": isc["inception_score_std"]}
    if "prc" in metrics:
        from torch_fidelity.metric_prc import prc_features_to_metric

        prc = prc_features_to_metric(
            features.to(device), real.to(device), prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        found |= {name: prc[name] for name in ("precision", "recall")}
    return found
