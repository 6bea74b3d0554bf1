"""Bench of compositions: which parts of the package pay at equal processor time."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.rows import row_config
from flowmaps import FlowMap, UserError
from training.config import Config

Fit = Callable[[Config, float | None], tuple[FlowMap, dict[str, Any]]]
AUGMENTED = "+network.augment_dim=9+data.augment=0.12"


class Stage(NamedTuple):
    """A run of a composition: its row with settings, and its share of the processor time."""

    row: str
    share: float


def two(row: str, common: str = "") -> list[Stage]:
    """Return a drift for half of the time, and from its weights the map of ``row``."""
    return [Stage(f"flow_matching{common}", 0.5), Stage(f"{row}{common}", 0.5)]


COMPOSITIONS: dict[str, list[Stage]] = {
    "lagrangian": [Stage("lagrangian", 1.0)],
    "drift, lagrangian": two("lagrangian"),
    "drift, mid-training, lagrangian": [
        Stage("flow_matching", 0.4),
        Stage("mid_training", 0.3),
        Stage("lagrangian", 0.3),
    ],
    "drift, lagrangian, average as teacher": two("lagrangian+objective.teacher_ema=0.99"),
    "drift, lagrangian, learned weight": two("lagrangian+weight.learned=True"),
    "drift, lagrangian, logit-normal times": two("lagrangian+objective.times=logit_normal"),
    "drift, lagrangian, augmentation": two("lagrangian", AUGMENTED),
    "drift, soflow": two("soflow"),
    "drift, mean_flow": two("mean_flow"),
    "imf": [Stage("imf", 1.0)],
}
DATA = {"digits": "", "fashion_mnist": "+cpu"}  # what the rows of each data set's config need on a CPU


def records(
    data: str,
    seed: int,
    minutes: float | None,
    steps: int | None,
    fit: Fit,
    score: Callable[[FlowMap], dict[str, float]],
    done: Collection[tuple[str, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a record for each composition that is not ``done``.

    ``fit`` trains a config for ``minutes`` of processor time, or for its steps: with ``steps`` that many of them,
    divided as the time would be.
    """
    for name, stages in COMPOSITIONS.items():
        if (f"{data}, {name}", seed) in done:
            continue
        trained, spent, before, drift = 0, 0.0, "", ""
        with tempfile.TemporaryDirectory() as folder:
            for number, (row, share) in enumerate(stages):
                config = row_config(row + DATA[data], f"configs/{data}.py")
                config.seed, config.init_from = seed, before
                config.steps = max(1, round(share * (steps or config.steps)))
                if row.startswith("mid_training"):
                    config.teacher = drift
                fm, facts = fit(config, minutes and share * minutes)
                trained, spent = trained + facts["train_steps"], spent + facts["cpu_minutes"]
                if number < len(stages) - 1:
                    before = f"{folder}/{number}"
                    fm.save_pretrained(before)
                    drift = drift or before
            facts = {"train_steps": trained, "cpu_minutes": round(spent, 2)}
            yield {"row": f"{data}, {name}", "seed": seed, **facts, "scores": score(fm)}


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the data sets named by --rows."""
    if unknown := [row for row in rows if row not in DATA]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=composition they are {', '.join(DATA)}")
    return list(rows)
