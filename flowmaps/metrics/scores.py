"""Metrics of a set of samples from one pass over them: all are functions of the same features.

Metrics that compare single images need the features themselves (``FeatureStats(keep=True)``). KID, the Inception Score,
precision and recall are defined on Inception features only, and computed by torch-fidelity's functions at its settings;
CMMD is defined on CLIP's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmaps.errors import UserError
from flowmaps.metrics.features import POINTS, Extractor
from flowmaps.metrics.frechet import check_comparable, frechet_distance
from flowmaps.metrics.points import board_kl
from flowmaps.metrics.stats import FeatureStats

KID_SUBSETS, KID_SUBSET = 100, 1000
SEED = 2020  # of KID's subsets and of the Inception Score's splits
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS = 1024  # of a kernel matrix at a time
LARGER_IS_BETTER = {"IS", "precision", "recall"}
NEIGHBOURS = 3
SPLITS = 10


class Sets(NamedTuple):
    """Statistics of the samples and of the reference, with single features where they were kept."""

    ours: FeatureStats
    reference: FeatureStats
    extractor: Extractor
    kid_subset: int
    device: torch.device | str

    @property
    def features(self) -> Tensor:
        """Features [n, dim] of the samples."""
        if self.ours.features is None or not len(self.ours.features):
            raise ValueError("this metric needs the features: use FeatureStats(keep=True)")
        return self.ours.features

    @property
    def real(self) -> Tensor:
        """Features [m, dim] of the reference."""
        return torch.empty(0) if self.reference.features is None else self.reference.features


def _fid(sets: Sets) -> dict[str, float]:
    return {sets.extractor.metric: frechet_distance(sets.ours, sets.reference)}


def _kl(sets: Sets) -> dict[str, float]:
    return {sets.extractor.metric: board_kl(sets.features)}


def _kid(sets: Sets) -> dict[str, float]:
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": sets.kid_subset, "rng_seed": SEED, "verbose": False}
    kid = kid_features_to_metric(sets.features, sets.real, **options)
    return {"KID": kid["kernel_inception_distance_mean"], "KID std": kid["kernel_inception_distance_std"]}


def _inception_score(sets: Sets) -> dict[str, float]:
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert sets.extractor.logits is not None  # check_metrics
    logits = sets.extractor.logits(sets.features).cpu()
    isc = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return {"IS": isc["inception_score_mean"], "IS std": isc["inception_score_std"]}


def _precision_recall(sets: Sets) -> dict[str, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
    prc = prc_features_to_metric(sets.features.to(sets.device), sets.real.to(sets.device), **options)
    return {name: prc[name] for name in ("precision", "recall")}


def _cmmd(sets: Sets) -> dict[str, float]:
    device = torch.device(sets.device)
    device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    ours, real = (F.normalize(x.to(device).double(), dim=1) for x in (sets.features, sets.real))

    def kernel(a: Tensor, b: Tensor) -> float:  # the mean of exp(-|x - y|^2 / 2 sigma^2), of unit vectors
        rows = (torch.exp((part @ b.T - 1) / CMMD_SIGMA**2).sum() for part in torch.split(a, ROWS))
        return float(sum(rows)) / len(a) / len(b)

    return {"CMMD": CMMD_SCALE * (kernel(ours, ours) + kernel(real, real) - 2 * kernel(ours, real))}


@dataclass(frozen=True)
class Metric:
    """A row of ``METRICS``: a function of two sets' features, and what it needs of them."""

    compute: Callable[[Sets], dict[str, float]]  # values by the names under which they are reported
    least: int | None  # fewest samples that it is defined on; None: those of one KID subset
    features: bool = False  # needs single features of the samples, not only their moments
    reference_features: bool = False  # needs single features of the reference
    distance: bool = False  # from the reference, so that real images have the smallest
    of: str = "inception"  # the features that it is defined on: "inception", "clip", "images" (any) or "points"


METRICS = {
    # Fréchet distance of the features' Gaussians: Heusel et al. 2017 (arXiv 1706.08500)
    "fid": Metric(_fid, 2, distance=True, of="images"),
    # Squared MMD, cubic kernel, mean and deviation over subsets: Binkowski et al. 2018 (arXiv 1801.01401)
    "kid": Metric(_kid, None, features=True, reference_features=True, distance=True),
    # Inception Score, mean and deviation over 10 splits: Salimans et al. 2016 (arXiv 1606.03498)
    "is": Metric(_inception_score, SPLITS, features=True),
    # Precision and recall by 3 nearest neighbours: Kynkäänniemi et al. 2019 (arXiv 1904.06991)
    "prc": Metric(_precision_recall, NEIGHBOURS + 1, features=True, reference_features=True),
    # Squared MMD on CLIP, Gaussian kernel, diagonal included, times 1000: Jayasumana et al. 2024 (arXiv 2401.09603)
    "cmmd": Metric(_cmmd, 2, features=True, reference_features=True, distance=True, of="clip"),
    # KL(data || model) on a grid, the only metric of points: flowmaps.metrics.board_kl
    "kl": Metric(_kl, 2, features=True, of="points"),
}


def distance_of(extractor: Extractor) -> str:
    """Return the metric that ``extractor.metric`` names, which a gate judges."""
    return "kl" if extractor.name == POINTS else "fid"


def defined(metrics: Sequence[str], extractor: Extractor) -> list[str]:
    """Return those of ``metrics`` that this extractor's features have; without any its distance."""
    kinds = {"images"}
    if extractor.name == POINTS:
        kinds = {"points"}
    elif extractor.logits:
        kinds.add("inception")
    elif extractor.name.startswith("clip-"):
        kinds.add("clip")
    own = [name for name, metric in METRICS.items() if metric.of in kinds]
    return [name for name in own if name in metrics] if metrics else [distance_of(extractor)]


def compares(extractor: Extractor) -> bool:
    """Tell whether a metric compares single features of this extractor."""
    return needs_reference_features(defined(list(METRICS), extractor))


def needs_features(metrics: Sequence[str]) -> bool:
    """Tell whether ``metrics`` need the samples' features besides their moments."""
    return any(METRICS[name].features for name in metrics if name in METRICS)


def needs_reference_features(metrics: Sequence[str]) -> bool:
    """Tell whether ``metrics`` need the reference's features besides its moments."""
    return any(METRICS[name].reference_features for name in metrics if name in METRICS)


def check_names(metrics: Sequence[str]) -> None:
    """Refuse unknown or repeated metrics; none at all means the default one."""
    if len(set(metrics)) < len(metrics) or not set(metrics) <= set(METRICS):
        raise UserError(f"give different ones of {', '.join(METRICS)}", field="metrics", value=",".join(metrics))


def check_metrics(
    metrics: Sequence[str], extractors: Sequence[Extractor], num: int, kid_subset: int = KID_SUBSET
) -> None:
    """Refuse metrics that ``num`` images and these extractors cannot give."""
    check_names(metrics or ("",))
    allowed = [name for name in METRICS if any(defined([name], extractor) for extractor in extractors)]
    if not set(metrics) <= set(allowed):
        names = ", ".join(extractor.name for extractor in extractors)
        raise UserError(
            f"only {', '.join(allowed)} {'is' if len(allowed) == 1 else 'are'} defined on the features of {names}: "
            "kl is for points, kid, is and prc need the extractor inception, and cmmd needs clip-vit-l-14 or another "
            "clip",
            field="metrics",
            value=",".join(metrics),
        )
    for name in metrics:
        least = METRICS[name].least
        least, remedy = (kid_subset, "give more, or a smaller kid_subset") if least is None else (least, "give more")
        if num < least:
            raise UserError(f"needs {least} images, there are {num}: {remedy}", field="metrics", value=name)


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
        metrics: Keys of ``METRICS``.
        kid_subset: Images in each of KID's subsets.
        device: Where the nearest neighbours of precision and recall are found.

    Returns:
        Values by the names under which they are reported: ``FID``, ``KID``, ``KID std``, ...

    Raises:
        UserError: A set lacks what a metric needs, or the two are not comparable.
    """
    check_metrics(metrics, [extractor], ours.n or 0, kid_subset)
    check_reference(metrics, reference, kid_subset)
    check_comparable(ours, reference)
    sets = Sets(ours, reference, extractor, kid_subset, device)
    return {
        name: value for metric in METRICS if metric in metrics for name, value in METRICS[metric].compute(sets).items()
    }
