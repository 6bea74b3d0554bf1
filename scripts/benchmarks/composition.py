"""Bench of compositions: which parts of the package pay at equal processor time."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.rows import row_config
from flowmaps import FlowMap, UserError, step_sizes
from training.config import Config

Fit = Callable[[Config, float | None], tuple[FlowMap, dict[str, Any]]]
AUGMENTED = "+network.augment_dim=9+data.augment=0.12"
MUON = "+muon+optim.muon_kernels=True+optim.lr=1e-2"
EARLY = "+objective.times=raised+objective.diagonal_draw=own+objective.time_mean=-2.5,0,0+objective.time_std=2,1.6,1.6"
LATE = "+objective.time_mean=0,2.5,0+objective.time_std=1.6,2,1.6"  # of soflow, whose times are raised by default


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
        Stage("flow_matching", 0.5),
        Stage("mid_training", 0.25),
        Stage("lagrangian", 0.25),
    ],
    "drift, lagrangian, average as teacher": two("lagrangian+objective.teacher_ema=0.99"),
    "drift, lagrangian, learned weight": two("lagrangian+weight.learned=True"),
    "drift, lagrangian, logit-normal times": two("lagrangian+objective.times=logit_normal"),
    "drift, lagrangian, augmentation": two("lagrangian", AUGMENTED),
    "drift, lagrangian, Muon": two("lagrangian", MUON),
    "drift, lagrangian, Muon, learned weight": two("lagrangian+weight.learned=True", MUON),
    "drift, lagrangian, early starts, Muon": two(f"lagrangian{EARLY}", MUON),
    "drift, soflow, Muon": two("soflow", MUON),
    "drift, soflow, uniform times, Muon": two("soflow+objective.times=triangle", MUON),
    "drift, soflow, late ends, Muon": two(f"soflow{LATE}", MUON),
    "drift, soflow": two("soflow"),
    "drift, mean_flow": two("mean_flow"),
    "imf": [Stage("imf", 1.0)],
}
FITTED = "drift, lagrangian"  # the composition that is also sampled with Bellman-optimal steps
DATA = {  # what comes before the other settings of a row
    "digits": "",
    "fashion_mnist": "+cpu+adamw+optim.muon_kernels=False+optim.lr=1e-3+precision=bf16",
}


class Trained(NamedTuple):
    """The map that a sequence of stages ends with, its training steps and its processor time, minutes."""

    fm: FlowMap
    train_steps: int
    cpu_minutes: float


@dataclass
class Trainings:
    """Trains the stages of compositions; a beginning that several of them share is trained once."""

    data: str
    seed: int
    minutes: float | None
    steps: int | None
    fit: Fit
    folder: str
    begun: dict[tuple[Stage, ...], tuple[str, Trained]] = field(default_factory=dict)

    def beginning(self, stages: tuple[Stage, ...]) -> tuple[str, Trained]:
        """Return the folder of the map that ``stages`` end with, and the map with its cost."""
        if stages not in self.begun:
            trained, path = self.run(stages), f"{self.folder}/{len(self.begun)}"
            trained.fm.save_pretrained(path)
            self.begun[stages] = path, trained
        return self.begun[stages]

    def run(self, stages: tuple[Stage, ...]) -> Trained:
        *before, stage = stages
        name, *settings = stage.row.split("+", 1)
        config = row_config("+".join([name + DATA[self.data], *settings]), f"configs/{self.data}.py")
        config.seed, config.steps = self.seed, max(1, round(stage.share * (self.steps or config.steps)))
        steps, spent = 0, 0.0
        if before:
            config.init_from, (_, steps, spent) = self.beginning(tuple(before))
        if stage.row.startswith("mid_training"):
            config.teacher, _ = self.beginning(stages[:1])
        fm, facts = self.fit(config, self.minutes and stage.share * self.minutes)
        return Trained(fm, steps + facts["train_steps"], spent + facts["cpu_minutes"])


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
    divided as the time would be. The time to fit step sizes is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(data, seed, minutes, steps, fit, folder)
        for name, stages in COMPOSITIONS.items():
            rows = [f"{data}, {name}", *([f"{data}, {name}, Bellman steps"] if name == FITTED else [])]
            if all((row, seed) in done for row in rows):
                continue
            fm, trained, spent = trainings.run(tuple(stages))
            facts = {"train_steps": trained, "cpu_minutes": round(spent, 2)}
            for row in rows:
                if row.endswith("Bellman steps"):
                    for sampler in ("map", "euler"):
                        fm.info.schedules[sampler] = step_sizes.fit(fm, (2, 4, 8), sampler=sampler, noises=128).schedule
                if (row, seed) not in done:
                    yield {"row": row, "seed": seed, **facts, "scores": score(fm)}


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the data sets named by --rows."""
    if unknown := [row for row in rows if row not in DATA]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=composition they are {', '.join(DATA)}")
    return list(rows)
