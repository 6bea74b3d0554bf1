"""The suites of benchmark.py: train rows of a config with several seeds, score them, make a table."""

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from benchmarks import composition, deployment, gate, guidance, initialisation, segments, steering, step_sizes
from benchmarks.derivatives import precision_errors, routes
from benchmarks.folders import FOLDERS, folder_times
from benchmarks.learning import learning_scores, optimiser_curves, with_optimisers
from benchmarks.objectives import COST_NETWORKS, network_costs
from benchmarks.profiling import profiles
from benchmarks.rows import row_config
from benchmarks.scoring import fid_costs
from benchmarks.sources import SOURCES, source_times
from benchmarks.speed import ema_times, layout_times, resume_times, sample_times, step_times
from flowmaps import FlowMap
from flowmaps.data import open_dataset
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.evaluation.plots import EVALUATIONS, lines
from flowmaps.evaluation.samples import samples
from flowmaps.metrics import board_kl, sliced_w2
from training.config import Config
from training.trainer import Trainer

Scores = dict[str, float]  # "KL, 4 steps" -> value
PLOTTED = ("bellman", "checkerboard", "digits", "fashion_mnist", "learning", "mid_training", "optimisers", "steering")
RATED = ("learning", "optimisers")  # that need --rates
MEMORISATION = ("floor", "samples_to_train", "samples_to_heldout", "heldout_to_train", "memorisation_ratio")
DIGITS, GARMENTS = "digits:heldout", "assets/references/fashion_mnist.npz"
CALIBRATION = 30  # steps timed to turn CPU minutes into a number of steps


def fit(config: Config, cpu_minutes: float | None) -> tuple[FlowMap, dict[str, Any]]:
    """Train in this process without writing anything, for ``cpu_minutes`` of process time if given."""
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
    """Return KL and sliced W2 of ``n`` samples at 1 .. 16 steps: of the map, or of Euler's method for a drift."""
    true = open_dataset("checkerboard", "heldout").fetch(torch.arange(n))[0]
    scores = {}
    for count in (1, 2, 4, 8, 16):
        x = samples(fm, count, n, seed=1)
        scores[f"KL@{count}"], scores[f"W2@{count}"] = board_kl(x), sliced_w2(x, true)
    return scores


def image_scores(reference: str, fm: FlowMap, n: int = 2000) -> Scores:
    """Return the Fréchet distance of ``n`` samples to ``reference``, by the map and by the same network's own drift.

    A map with fitted step sizes takes those. Of digits, which are few, also nearest-neighbour distances (of the last
    sampler and step count).
    """
    stats, data = open_reference(reference, device=torch.device("cpu")), reference == DIGITS
    few, solver = (fm.info.sampler, (1, 2, 4, 8)), ("euler", (1, 4, 64))
    scores: Scores = {}
    row: dict[str, Any] = {}
    for sampler, steps in {"map": (solver, few), "drift": (solver,), "consistency": (few,)}[fm.info.kind]:
        options: dict[str, Any] = {"sampler": sampler, "memorisation": data}
        record = evaluate(fm, stats, steps=steps, num=n, seeds=(1,), **options)
        for row in record["results"]:
            scores[f"{sampler}@{row['steps']}"] = row[record["metric"]]
    return scores | {key: row[key] for key in MEMORISATION if data}


@dataclass(frozen=True)
class Arguments:
    """The flags of benchmark.py; a record is identified by (row, seed), and those in ``done`` are not made again."""

    rows: list[str]
    seeds: list[int]
    train_steps: int | None = None
    cpu_minutes: float | None = None
    num: int | None = None
    rates: Sequence[float] = ()
    done: Collection[tuple[str, int]] = ()


Records = Iterator[dict[str, Any]]


def timed(score: Callable[[str], Scores], args: Arguments) -> Records:
    """Yield one record per row, which ``score`` makes."""
    for row in (row for row in args.rows if (row, 0) not in args.done):
        yield {"row": row, "seed": 0, "scores": score(row)}


def trained(file: str, score: Callable[..., Scores], args: Arguments) -> Records:
    """Train each row of ``file`` with each seed and yield its scores."""
    for row, seed in itertools.product(args.rows, args.seeds):
        if (row, seed) in args.done:
            continue
        config = row_config(row, file)
        config.seed, config.steps = seed, args.train_steps or config.steps
        fm, facts = fit(config, args.cpu_minutes)
        yield {"row": row, "seed": seed, **facts, "scores": score(fm, args.num) if args.num else score(fm)}


def learning(args: Arguments) -> Records:
    """Yield the learning curve of each row, rate and seed."""
    score = partial(learning_scores, num=args.num or 2000)
    for row, rate, seed in itertools.product(args.rows, args.rates, args.seeds):
        name = f"{row}, lr {rate:g}"
        if (name, seed) not in args.done:
            config = row_config(row)
            config.seed, config.steps, config.optim.lr = seed, args.train_steps or config.steps, rate
            yield {"row": name, "seed": seed, "train_steps": config.steps, "scores": score(config)}


def optimisers(args: Arguments) -> Records:
    """Yield the learning curve of each row with each optimiser, rate and seed."""
    return learning(replace(args, rows=with_optimisers(args.rows)))


def mid_training(args: Arguments) -> Records:
    """Yield the records of ``benchmarks.initialisation``."""
    for data, seed in itertools.product(initialisation.chosen(args.rows), args.seeds):
        setting = initialisation.SETTINGS[data]
        yield from initialisation.records(data, seed, setting, train_steps=args.train_steps, done=args.done)


def bellman(args: Arguments) -> Records:
    """Yield the records of ``benchmarks.step_sizes``."""
    for data in step_sizes.chosen(args.rows):
        for seed in [0] if data in step_sizes.EXACT else args.seeds:
            yield from step_sizes.records(data, seed, args.train_steps, args.num, args.done)


def guided(args: Arguments) -> Records:
    """Yield the records of ``benchmarks.guidance``."""
    for target, seed in itertools.product(guidance.chosen(args.rows), args.seeds):
        if (target, seed) not in args.done:
            yield from guidance.records(target, seed, args.train_steps, args.num)


def steered(args: Arguments) -> Records:
    """Yield the records of ``benchmarks.steering``."""
    for row, seed in itertools.product(steering.chosen(args.rows), args.seeds):
        yield from steering.records(row, seed, args.num, args.done)


def compositions(args: Arguments) -> Records:
    """Yield the records of ``benchmarks.composition``."""
    for data, seed in itertools.product(composition.chosen(args.rows), args.seeds):
        score = partial(image_scores, {"digits": DIGITS}.get(data, GARMENTS), n=args.num or 2000)
        yield from composition.records(data, seed, args.cpu_minutes, args.train_steps, fit, score, args.done)


def several(scores_of: Callable[[str], Iterator[tuple[str, Scores]]], args: Arguments) -> Records:
    """Yield the records that ``scores_of`` each row gives, unless one of them is done."""
    for name in args.rows:
        if not any(row.startswith(f"{name}, ") for row, _ in args.done):
            yield from ({"row": row, "seed": 0, "scores": scores} for row, scores in scores_of(name))


def fid(args: Arguments) -> Records:
    """Yield the cost of each way to score."""
    return fid_costs(args.num or 512, done=args.done)


_MAPS = ["flow_matching", "lagrangian"]
_GARMENTS = ["lagrangian+cpu"]
# suite -> its records, and its default rows
SUITES: dict[str, tuple[Callable[[Arguments], Records], list[str]]] = {
    "bellman": (bellman, step_sizes.ROWS),
    "checkerboard": (partial(trained, "configs/checkerboard.py", checkerboard_scores), _MAPS),
    "composition": (compositions, ["digits"]),
    "deployment": (lambda args: several(partial(deployment.runtimes, num=args.num), args), deployment.MODELS),
    "digits": (partial(trained, "configs/digits.py", partial(image_scores, DIGITS)), _MAPS),
    "ema": (partial(timed, ema_times), ["lagrangian"]),
    "fashion_mnist": (partial(trained, "configs/fashion_mnist.py", partial(image_scores, GARMENTS)), _GARMENTS),
    "fid": (fid, ["all"]),
    "folders": (lambda args: timed(partial(folder_times, num=args.num), args), list(FOLDERS)),
    "gate": (lambda args: several(lambda row: gate.scores(row, args.num, args.train_steps), args), list(gate.ROWS)),
    "guidance": (guided, list(guidance.TARGETS)),
    "layout": (partial(timed, layout_times), ["UNet", "EDM2UNet"]),
    "learning": (learning, _MAPS),
    "mid_training": (mid_training, list(initialisation.SETTINGS)),
    "networks": (partial(several, network_costs), list(COST_NETWORKS)),
    "optimisers": (optimisers, ["lagrangian", "lagrangian+small_DiT"]),
    "precision": (partial(several, precision_errors), ["gaussian", "digits"]),
    "profile": (partial(timed, profiles), list(COST_NETWORKS)),
    "resume": (partial(timed, resume_times), ["lagrangian"]),
    "routes": (partial(several, routes), list(COST_NETWORKS)),
    "sample": (partial(timed, sample_times), list(COST_NETWORKS)),
    "segments": (lambda args: several(partial(segments.scores, num=args.num), args), ["assets/fashion_mnist"]),
    "sources": (lambda args: timed(partial(source_times, num=args.num), args), list(SOURCES)),
    "steering": (steered, steering.ROWS),
    "step": (partial(timed, step_times), [*_MAPS, *(f"{row}+DiT" for row in _MAPS)]),
}


def plot(records: list[dict[str, Any]], suite: str) -> Image.Image:
    """Plot each metric against the number of steps or images, one line per row: means, with the range as bars."""
    if suite == "steering":
        return steering.picture(records[0]["row"].partition(",")[0])
    if suite == "mid_training":
        return lines(initialisation.curves(records), xlabel="images seen")
    if suite == "bellman":
        return lines(step_sizes.curves(records))
    if suite == "optimisers":
        return lines(optimiser_curves(records), xlabel="images seen")
    found = []
    for record in records:
        for name, value in record["scores"].items():
            metric, _, steps = name.partition("@")
            if steps:
                found.append((record["row"], metric, int(steps), value))
    return lines(found, xlabel="images seen" if suite == "learning" else EVALUATIONS)
