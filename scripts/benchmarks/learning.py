"""Learning curves on digits, and those of each optimiser at its best learning rate."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from flowmaps.evaluation import evaluate, open_reference
from training.config import Config, Optimizer
from training.trainer import Trainer


def learning_scores(config: Config, num: int) -> dict[str, float]:
    """Return FD-digits of ``num`` samples at 1 and 4 steps, after 1/8, 1/4, 1/2 and all of the training."""
    heldout = open_reference("digits:heldout", device=torch.device("cpu"))
    trainer, scores = Trainer.build(config), {}
    marks = [config.steps // part for part in (8, 4, 2, 1)]
    for step in range(config.steps):
        trainer.step(step)
        if step + 1 in marks:
            fm = trainer.averaged(step + 1)
            for row in evaluate(fm, heldout, steps=(1, 4), num=num, seeds=(1,), schedule="uniform")["results"]:
                scores[f"FD-digits, steps={row['steps']}@{(step + 1) * config.batch}"] = row["FD-digits"]
    return scores


def with_optimisers(rows: Sequence[str]) -> list[str]:
    """Return each row with each optimiser."""
    return [f"{row}+{name}" for row in rows for name in Optimizer.__members__]


def best_rates(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of each row at the rate with the lowest last score, a mean over seeds.

    A run without a score, which has diverged, is not the lowest.
    """
    ends: dict[str, dict[str, list[float]]] = {}
    for record in records:
        last = list(record["scores"].values())[-1]
        rates = ends.setdefault(record["row"].partition(",")[0], {})
        rates.setdefault(record["row"], []).append(math.inf if math.isnan(last) else last)
    best = {min(rates, key=lambda rate: statistics.mean(rates[rate])) for rates in ends.values()}
    return [record for record in records if record["row"] in best]


def optimiser_curves(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    """Return (optimiser, panel, images seen, score) at the best rates, with panels for each network."""
    found = []
    for record in best_rates(records):
        row, _, optimiser = record["row"].rpartition("+")  # "lagrangian", "muon, lr 0.01"
        for name, value in record["scores"].items():
            metric, _, images = name.partition("@")
            found.append((optimiser.partition(",")[0], f"{row}: {metric}", int(images), value))
    return found
