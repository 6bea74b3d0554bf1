"""False alarms and power of the gate: what share of repeated draws it finds worse, for pairs of models."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.evaluation import Reference, open_reference
from flowmaps.evaluation.samples import sample_batches
from flowmaps.evaluation.verdicts import Difference
from flowmaps.images import to_uint8
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.influence import standard_error
from samplers import uniform_times
from training.config_rows import load_row
from training.trainer import Trainer

# Config row, training steps, samples of each model.
ROWS = {"digits": ("lagrangian", 600, 12_000), "fashion_mnist": ("lagrangian,cpu", 150, 6_000)}
DRAWS = 200  # sets of ``num`` samples drawn from them
EMAS = (0.99, 0.9)
RULE = 0.05  # the tolerance of a gate without statistics


def trained(data: str, steps: int | None) -> dict[str, FlowMap]:
    """Train one model, and return its averages, and the first one after half of the steps."""
    row, usual, _ = ROWS[data]
    config = load_row(f"configs/{data}.py", row)
    config.steps, config.ema = steps or usual, EMAS
    if data == "fashion_mnist":  # minutes of a core instead of two hours
        config.network.width, config.batch, config.optim.lr, config.optim.warmup = 16, 32, 3e-3, 20
    trainer, found = Trainer.build(config), dict[str, FlowMap]()
    for step in range(config.steps):
        trainer.step(step)
        if step + 1 == config.steps // 2:
            found["half-trained"] = trainer.averaged(step + 1)
    found["EMA 0.99"] = whole = trainer.averaged(config.steps)
    network = trainer.ema.network(EMAS[1])
    found["EMA 0.9"] = FlowMap(network, whole.interpolant_name, whole.base_std, whole.info).eval()
    return found


def pool(fm: FlowMap, reference: Reference, pooled: int) -> Tensor:
    """Return the features [pooled, dim] of one-step samples; sample i has the same noise and label of every model."""
    batches = (to_uint8(x) for x, _ in sample_batches(fm, uniform_times(1), range(pooled), seed=1, batch=500))
    features = reference.extractor.stats(batches, keep=True).features
    assert features is not None
    return features


def row_of(features: Tensor, reference: Reference) -> dict[str, Any]:
    """Return a record's row of these samples, whose labels are those of ``label_policy=balanced``."""
    stats = FeatureStats(features.shape[1], reference.stats.origin, keep=True).update(features)
    _, blocks = standard_error(stats, reference.stats, torch.arange(len(features)) % 10)
    return {"FD": frechet_distance(stats, reference.stats), "influence": {"FD": [blocks]}}


def drawn(pooled: int, num: int, g: torch.Generator) -> Tensor:
    """Return two times ``num`` different indices [2, num] of a pool: label i mod 10 at each place, as in it."""
    each, classes = num // 10, []
    for label in range(10):
        order = torch.randperm(pooled // 10, generator=g)[: 2 * each] * 10 + label
        classes.append(order.view(2, each))
    return torch.stack(classes, dim=2).flatten(1)


def scores(data: str, num: int | None, train_steps: int | None) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of each pair and the shares in % of draws in which "after" is found worse than "before"."""
    if data not in ROWS:
        raise UserError(f"--rows={data}: of --suite=gate they are {', '.join(ROWS)}")
    pooled, draws = (ROWS[data][2], DRAWS) if train_steps is None else (10 * (num or 2000), 10)
    reference = open_reference(f"{data}:heldout", device=torch.device("cpu"))
    of = {name: pool(fm, reference, pooled) for name, fm in trained(data, train_steps).items()}
    g = torch.Generator().manual_seed(0)
    best, *others = "EMA 0.99", "EMA 0.9", "half-trained"
    pairs = [(f"equal: {best}, other noise", best, best)]
    pairs += [(f"equal: {best} and {other} mixed", best, other) for other in others]
    pairs += [(f"{a} -> {b}", a, b) for other in others for a, b in ((best, other), (other, best))]
    for name, before, after in pairs:
        yield f"{data}, {name}", compare(of[before], of[after], reference, num or 2000, g, name, draws)


def compare(
    before: Tensor, after: Tensor, reference: Reference, num: int, g: torch.Generator, name: str, draws: int
) -> dict[str, float]:
    """Return the change of the distance from one pool to the other, and how often each rule finds it worse, in %.

    Of equal models: two sets of samples of one model, or two mixtures, in which a coin tells for each noise which model
    makes the sample of the first one; the other model makes that of the second one.
    """
    whole = [frechet_distance(FeatureStats(x.shape[1]).update(x), _bare(reference)) for x in (before, after)]
    mixed, other_noise = name.endswith("mixed"), name.endswith("noise")
    found: dict[str, list[bool]] = {}
    for _ in range(draws):
        first, second = drawn(len(before), num, g)
        old, new, unpaired = before[first], after[second if other_noise else first], after[second]
        if mixed:
            coin = torch.rand(2, num, 1, generator=g) < 0.5
            old, new = torch.where(coin[0], old, new), torch.where(coin[0], new, old)
            unpaired = torch.where(coin[1], before[second], unpaired)
        then, now = row_of(old, reference), row_of(new, reference)
        difference = Difference.of(now, then, "FD")
        other = frechet_distance(FeatureStats(old.shape[1]).update(unpaired), _bare(reference))
        for rule, worse in (
            ("gate", difference.is_worse(0.99)),
            ("gate, 0.95", difference.is_worse(0.95)),
            ("5 % rule", difference.value > (1 + RULE) * difference.before),
            ("5 % rule, other seed", other > (1 + RULE) * difference.before),
        ):
            found.setdefault(rule, []).append(bool(worse))
    shares = {rule: 100 * sum(worse) / len(worse) for rule, worse in found.items()}
    return {"change": 0.0 if mixed else 100 * (whole[1] / whole[0] - 1), **shares}


def _bare(reference: Reference) -> FeatureStats:
    """Return the moments of a reference without their origin, which features alone do not have."""
    stats = FeatureStats(reference.stats.dim)
    stats.n, stats.mean, stats.scatter = reference.stats.n, reference.stats.mean, reference.stats.scatter
    return stats
