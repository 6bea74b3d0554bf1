"""Experiments that the documents quote: train rows of a config with several seeds, score them, make a table."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import initialisation as handover
from benchmarks import step_sizes as bellman_suite
from benchmarks.objectives import COST_NETWORKS, network_costs
from benchmarks.profiling import profiles
from benchmarks.scoring import fid_costs
from benchmarks.speed import ema_times, resume_times, sample_times, step_times
from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.evaluation.evaluate import floor, neighbours
from flowmaps.evaluation.references import pick_extractor, source_stats
from flowmaps.evaluation.report import EVALUATIONS, lines
from flowmaps.evaluation.samples import samples
from flowmaps.images import to_uint8
from flowmaps.metrics import board_kl, frechet_distance, sliced_w2
from training.config import Config
from training.config_rows import load_row
from training.trainer import Trainer

Scores = dict[str, float]  # "KL, 4 steps" -> value
PLOTTED = ("bellman", "checkerboard", "digits", "learning", "mid_training")
CALIBRATION = 30  # steps timed to turn CPU minutes into a number of steps


def fit(config: Config, cpu_minutes: float | None) -> tuple[FlowMap, dict[str, Any]]:
    """Train in this process without writing anything; ``cpu_minutes`` of process time decide the steps, if given."""
    if cpu_minutes:
        trial = Trainer.build(config)
        trial.step(0)
        start = time.process_time()
        for step in range(1, CALIBRATION + 1):
            trial.step(step)
        config.steps = max(1, int(60 * cpu_minutes / ((time.process_time() - start) / CALIBRATION)))
    trainer = Trainer.build(config)
    start = time.process_time()
    for step in range(config.steps):
        trainer.step(step)
    facts = {"train_steps": config.steps, "cpu_minutes": round((time.process_time() - start) / 60, 2)}
    return trainer.averaged(config.steps), facts


def checkerboard_scores(fm: FlowMap, n: int = 32_768) -> Scores:
    """KL and sliced W2 of ``n`` samples at 1 .. 16 steps: the map's, or Euler's for a drift."""
    true = open_dataset("checkerboard", "heldout").fetch(torch.arange(n))[0]
    scores = {}
    for count in (1, 2, 4, 8, 16):
        x = samples(fm, count, n, seed=1)
        scores[f"KL@{count}"], scores[f"W2@{count}"] = board_kl(x), sliced_w2(x, true)
    return scores


def digits_scores(fm: FlowMap, n: int = 2000) -> Scores:
    """FD-digits of ``n`` samples to the held-out digits, by the map and by the same network's own drift."""
    extractor = pick_extractor(None, None, "digits", torch.device("cpu"))
    heldout = source_stats("digits:heldout", extractor, "", "--data")
    scores, images = {}, torch.empty(0)
    few, solver = (fm.info.sampler, (1, 2, 4, 8)), ("euler", (1, 4, 64))
    for sampler, counts in {"map": (solver, few), "drift": (solver,), "consistency": (few,)}[fm.info.kind]:
        for count in counts:
            images = to_uint8(samples(fm, count, n, 1, sampler))
            scores[f"{sampler}@{count}"] = frechet_distance(extractor.stats(torch.split(images, 500)), heldout)
    return scores | {"floor": floor("digits", extractor, "")} | neighbours(images, "digits", "")


def learning_scores(config: Config, num: int = 2000) -> Scores:
    """FD-digits of ``num`` samples at 1 and 4 steps, after 1/8, 1/4, 1/2 and all of the training."""
    extractor = pick_extractor(None, None, "digits", torch.device("cpu"))
    heldout = source_stats("digits:heldout", extractor, "", "--data")
    trainer, scores = Trainer.build(config), {}
    marks = [config.steps // part for part in (8, 4, 2, 1)]
    for step in range(config.steps):
        trainer.step(step)
        if step + 1 in marks:
            fm = trainer.averaged(step + 1)
            for count in (1, 4):
                images = to_uint8(samples(fm, count, num, seed=1))
                value = frechet_distance(extractor.stats(torch.split(images, 500)), heldout)
                scores[f"FD-digits, steps={count}@{(step + 1) * config.batch}"] = value
    return scores


@dataclass(frozen=True)
class Request:
    """What benchmark.py was asked for; a record is known by its (row, seed), and those ``done`` are not made again."""

    rows: list[str]
    seeds: list[int]
    train_steps: int | None = None
    cpu_minutes: float | None = None
    num: int | None = None
    rates: Sequence[float] = ()
    done: Collection[tuple[str, int]] = ()


Records = Iterator[dict[str, Any]]


def _timed(score: Callable[[str], Scores]) -> Callable[[Request], Records]:
    """A suite with one record a row, which ``score`` makes."""

    def records(asked: Request) -> Records:
        for row in (row for row in asked.rows if (row, 0) not in asked.done):
            yield {"row": row, "seed": 0, "scores": score(row)}

    return records


def _trained(file: str, score: Callable[..., Scores]) -> Callable[[Request], Records]:
    """A suite that trains each row of ``file`` with each seed and gives it a ``score``."""

    def records(asked: Request) -> Records:
        for row, seed in itertools.product(asked.rows, asked.seeds):
            if (row, seed) in asked.done:
                continue
            config = load_row(file, row)
            config.seed, config.steps = seed, asked.train_steps or config.steps
            fm, facts = fit(config, asked.cpu_minutes)
            yield {"row": row, "seed": seed, **facts, "scores": score(fm, asked.num) if asked.num else score(fm)}

    return records


def _learning(asked: Request) -> Records:
    for row, rate, seed in itertools.product(asked.rows, asked.rates, asked.seeds):
        name = f"{row}, lr {rate:g}"
        if (name, seed) not in asked.done:
            config = load_row("configs/digits.py", row)
            config.seed, config.steps, config.optim.lr = seed, asked.train_steps or config.steps, rate
            yield {"row": name, "seed": seed, "train_steps": config.steps, "scores": learning_scores(config)}


def _mid_training(asked: Request) -> Records:
    for data, seed in itertools.product(handover.chosen(asked.rows), asked.seeds):
        yield from handover.records(data, seed, handover.SETTINGS[data], train_steps=asked.train_steps, done=asked.done)


def _bellman(asked: Request) -> Records:
    for data in bellman_suite.chosen(asked.rows):
        for seed in [0] if data in bellman_suite.EXACT else asked.seeds:
            yield from bellman_suite.records(data, seed, asked.train_steps, asked.num, asked.done)


def _networks(asked: Request) -> Records:
    for name in (name for name in asked.rows if (f"{name}, flow_matching", 0) not in asked.done):
        yield from ({"row": row, "seed": 0, "scores": scores} for row, scores in network_costs(name))


_MAPS = ["flow_matching", "lagrangian"]
# suite -> its records, and the rows that it has if none are given
SUITES: dict[str, tuple[Callable[[Request], Records], list[str]]] = {
    "bellman": (_bellman, bellman_suite.ROWS),
    "checkerboard": (_trained("configs/checkerboard.py", checkerboard_scores), _MAPS),
    "digits": (_trained("configs/digits.py", digits_scores), _MAPS),
    "ema": (_timed(ema_times), ["lagrangian"]),
    "fid": (lambda asked: fid_costs(asked.num or 512, done=asked.done), ["all"]),
    "learning": (_learning, _MAPS),
    "mid_training": (_mid_training, list(handover.SETTINGS)),
    "networks": (_networks, list(COST_NETWORKS)),
    "profile": (_timed(profiles), list(COST_NETWORKS)),
    "resume": (_timed(resume_times), ["lagrangian"]),
    "sample": (_timed(sample_times), list(COST_NETWORKS)),
    "step": (_timed(step_times), [*_MAPS, *(f"{row}+DiT" for row in _MAPS)]),
}


def stored_records(file: str, suite: str, budget: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an earlier call with the same suite and budget, none if there is no file yet."""
    if not Path(file).exists():
        return []
    try:
        stored = json.loads(Path(file).read_text())
        records: list[dict[str, Any]] = stored["records"]
        same = (stored["suite"], stored["budget"]) == (suite, budget)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--json={file} is no file of this script: name another") from None
    if not same:
        raise UserError(f"--json={file} has records of another suite or budget: name another file")
    return records


# Boffi et al. 2025, table 1: another network and budget (MLP 4 x 512, 150,000 steps of 100,000 points), and a KL whose
# definition is not published.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "checkerboard": {
        row: {f"KL@{n}": kl for n, kl in zip((1, 2, 4, 8, 16), kls, strict=True)}
        for row, kls in {
            "lagrangian": (0.086, 0.077, 0.071, 0.070, 0.071),
            "eulerian": (0.098, 0.092, 0.083, 0.082, 0.075),
            "progressive": (0.146, 0.089, 0.081, 0.072, 0.069),
            "progressive_uniform": (0.111, 0.107, 0.075, 0.073, 0.068),
        }.items()
    }
}


def markdown(records: list[dict[str, Any]], suite: str = "") -> str:
    """A Markdown table: mean over seeds and half the range of every score, a row each, and the paper's numbers."""
    found = list(dict.fromkeys(name for record in records for name in record["scores"]))
    metrics = list(dict.fromkeys(name.partition("@")[0] for name in found))
    names = sorted(found, key=lambda name: metrics.index(name.partition("@")[0]))
    facts = [key for key in records[0] if isinstance(records[0][key], (int, float)) and key != "seed"]
    table = ["| | " + " | ".join([*facts, *names]) + " |", "|---" * (1 + len(facts) + len(names)) + "|"]
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        cells = [row, *(f"{statistics.mean(r[key] for r in mine):.4g}" for key in facts)]
        for name in names:
            values = [r["scores"][name] for r in mine if name in r["scores"]]
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        table.append("| " + " | ".join(cells) + " |")
        if row in PAPER.get(suite, {}):
            published = [str(PAPER[suite][row].get(name, "")) for name in names]
            table.append("| " + " | ".join([f"{row}, paper", *[""] * len(facts), *published]) + " |")
    return "\n".join(table)


def plot(records: list[dict[str, Any]], suite: str) -> Image.Image:
    """Each metric against the number of steps or images, one line a row: mean over seeds, with the range as bars."""
    if suite == "mid_training":
        return lines(handover.curves(records), xlabel="images seen")
    if suite == "bellman":
        return lines(bellman_suite.curves(records))
    found = []
    for record in records:
        for name, value in record["scores"].items():
            metric, _, steps = name.partition("@")
            if steps:
                found.append((record["row"], metric, int(steps), value))
    return lines(found, xlabel="images seen" if suite == "learning" else EVALUATIONS)
