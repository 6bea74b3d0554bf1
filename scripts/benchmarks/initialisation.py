"""Bench of initialisation: post-training from random weights, from a drift and from mid-training."""

import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowmaps import FlowMap, UserError
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.objectives import Consistency
from flowmaps.objectives.mid_training import MidTraining, Target
from training.config import Config
from training.config_rows import load_row
from training.trainer import Trainer

MARKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the map's training steps
COUNTS = (1, 2)  # sampling steps
NUM = {"digits": 2000, "checkerboard": 32_768}  # samples to score
RATES = {"lagrangian": 0.3, "mean_flow": 0.3, "consistency": 0.1}  # learning rates after mid-training, as multiples
GAP = 64.0  # consistency's q after mid-training, from its first step on: no stages


class Budget(NamedTuple):
    """Training steps of a data set's map; with mid-training, ``middle`` of them are for that."""

    steps: int
    middle: int


SETTINGS = {"digits": Budget(1000, 500), "checkerboard": Budget(2000, 1000)}


class Curve:
    """Scores of a map at ``MARKS`` of its training, which may consist of several runs."""

    def __init__(self, data: str, total: int) -> None:
        self.data, self.total, self.scores = data, total, dict[str, float]()
        self.reference = open_reference(f"{data}:heldout", device=torch.device("cpu"))

    def run(self, config: Config, before: int = 0) -> FlowMap:
        """Train ``config``; its first step is step ``before`` of the map's training."""
        trainer, marks = Trainer.build(config), {round(mark * self.total) for mark in MARKS}
        for step in range(config.steps):
            trainer.step(step)
            if (done := before + step + 1) in marks:
                fm = trainer.averaged(step + 1)
                rows = evaluate(fm, self.reference, steps=COUNTS, num=NUM[self.data], seeds=(1,), schedule="uniform")
                name = rows["metric"]
                for row in rows["results"]:
                    self.scores[f"{name}, steps={row['steps']}@{done * config.batch}"] = row[name]
        return trainer.averaged(config.steps)


def middle(data: str, seed: int, target: Target, teacher: str, setting: Budget) -> Config:
    """Return the config of mid-training from the weights and on the trajectories of ``teacher``."""
    config = load_row(f"configs/{data}.py", "mid_training")
    config.objective = MidTraining(target=target, to_end=0.5 if target is Target.pairs else 0.0)
    config.init_from = config.teacher = teacher
    config.seed, config.steps = seed, setting.middle
    return config


def records(
    data: str,
    seed: int,
    setting: Budget,
    methods: Sequence[str] = tuple(RATES),
    train_steps: int | None = None,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a record for each method and start that is not ``done``: scores against images, cost of the teacher."""
    names = [f"{data}, {method} from {start}" for method in methods for start in ("random", "drift", "mid-training")]
    if all((name, seed) in done for name in names):
        return
    if train_steps:
        setting = setting._replace(steps=train_steps, middle=train_steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        config = load_row(f"configs/{data}.py", "flow_matching")
        config.seed, config.steps = seed, train_steps or config.steps
        clock = time.process_time()
        Curve(data, 0).run(config).save_pretrained(teacher := f"{folder}/teacher")
        cost = {"teacher_images": config.steps * config.batch, "teacher_cpu_s": round(time.process_time() - clock)}
        mid: dict[Target, Curve] = {}
        for method in methods:
            target = Target.endpoint if method == "consistency" else Target.pairs
            for start in ("random", "drift", "mid-training"):
                name = f"{data}, {method} from {start}"
                if (name, seed) in done:
                    continue
                clock, curve, before = time.process_time(), Curve(data, setting.steps), 0
                config = load_row(f"configs/{data}.py", method)
                config.seed, config.steps = seed, setting.steps
                config.init_from = teacher if start == "drift" else ""
                if start == "mid-training":
                    where = Path(folder) / target.name
                    if target not in mid:
                        mid[target] = Curve(data, setting.steps)
                        mid[target].run(middle(data, seed, target, teacher, setting)).save_pretrained(where)
                    curve.scores |= mid[target].scores
                    before, config.init_from = setting.middle, str(where)
                    config.steps, config.optim.lr = setting.steps - before, RATES[method] * config.optim.lr
                    if isinstance(config.objective, Consistency):
                        config.objective.q, config.objective.stage_steps = GAP, 0
                curve.run(config, before)
                facts = dict.fromkeys(cost, 0) if start == "random" else cost
                seconds = round(time.process_time() - clock)
                yield {"row": name, "seed": seed, **facts, "cpu_s": seconds, "scores": curve.scores}


def curves(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    """Return (start, panel, images, score) of one-step samples; with a teacher also with its images counted."""
    points = []
    for record in records:
        method, _, start = record["row"].partition(", ")[2].partition(" from ")
        for name, value in record["scores"].items():
            metric, _, images = name.partition("@")
            if metric.endswith("steps=1"):
                points.append((start, f"{method}: {metric}", int(images), value))
                if teacher := record["teacher_images"]:
                    points.append((f"{start}, teacher counted", f"{method}: {metric}", int(images) + teacher, value))
    return points


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the data sets named by --rows."""
    if unknown := [row for row in rows if row not in SETTINGS]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=mid_training they are {', '.join(SETTINGS)}")
    return list(rows)
