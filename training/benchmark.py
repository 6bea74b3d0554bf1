"""Experiments that the documents quote: train rows of a config with several seeds, score them, make a table."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from flowmaps import FlowMap, UserError
from flowmaps.derivatives import velocity_jvp
from flowmaps.images import to_uint8
from flowmaps.metrics import board_kl, frechet_distance, sliced_w2
from flowmaps.networks import NETWORKS
from flowmaps.objectives import (
    Consistency,
    Draws,
    Eulerian,
    FlowMatching,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    Objective,
    Progressive,
)
from flowmaps.objectives.base import mean_square
from flowmaps.objectives.eulerian import Stop
from flowmaps.objectives.lagrangian import Derivative
from flowmaps.rng import generator
from samplers.callables import Drift, expand
from training.config import Config, Precision, load_row
from training.data import load_arrays
from training.evaluation import samples
from training.scoring import floor, neighbours, pick_extractor, source_stats
from training.trainer import CHANNELS_LAST, Trainer

Scores = dict[str, float]  # "KL, 4 steps" -> value
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


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": Precision.bf16},
    "channels_last": {"channels_last": True},
    "accumulate 2": {"accumulate": 2},
    "compile": {"compile": True},
}


def step_times(file: str, row: str, rounds: int = 15) -> Scores:
    """Seconds of a training step of each variant, and as a ratio to eager float32; medians of interleaved rounds."""
    trainers = {}
    for name, changes in VARIANTS.items():
        if "channels_last" in changes and not CHANNELS_LAST:
            continue
        AcceleratorState._reset_state()  # one process, several precisions
        trainers[name] = Trainer.build(dataclasses.replace(load_row(file, row), **changes))
        for step in range(3):  # compiles, fills caches
            trainers[name].step(step)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(3, 3 + rounds):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            float(trainer.step(step)["loss"])  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {"fp32 s": median["fp32"]} | {f"{name} / fp32": median[name] / median["fp32"] for name in list(median)[1:]}


@dataclass(frozen=True)
class Unsplit(Lagrangian):
    """Lagrangian self-distillation as one expression over all rows, with t - s = 0 on the diagonal: the reference form.

    The package splits the batch instead, since a row with s = t needs no derivative.
    """

    def per_sample(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        weight: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x0, s, t = draws.x0, draws.s, draws.t
        x, velocity = fm.interpolant.point(x0, x1, s), fm.interpolant.velocity(x0, x1, s)
        v, dv = velocity_jvp(fm, x, s, t, label, dt=1.0)
        gap = expand(t - s, x)
        with torch.no_grad():
            target = torch.where(gap == 0, velocity, fm.drift(x + gap * v, t, label))
        return mean_square(v + gap * dv - target), {}


COSTS: dict[str, Objective] = {
    "flow_matching": FlowMatching(),
    "progressive": Progressive(),
    "mean_flow": MeanFlow(),
    "improved_mean_flow": ImprovedMeanFlow(),
    "lagrangian": Lagrangian(),
    "lagrangian, slim": Lagrangian(slim=True),
    "lagrangian, finite": Lagrangian(derivative=Derivative.finite),
    "lagrangian, unsplit": Unsplit(),
    "eulerian": Eulerian(),
    "eulerian, slim": Eulerian(stop=Stop.slim),
    "consistency": Consistency(),
}
COST_NETWORKS: dict[str, Any] = {
    "UNet": {"width": 32, "channel_mult": (1, 2, 2), "blocks": 1, "attention_resolutions": (8,)},
    "DiT": {"patch": 4, "width": 192, "depth": 6, "heads": 3},
}


def objective_costs(name: str, rounds: int = 7, batch: int = 32) -> Iterator[tuple[str, Scores]]:
    """Process time of loss and gradient on ``batch`` images of 32 x 32, relative to flow matching.

    Medians of interleaved rounds, one process, no optimiser; every objective at its own share of diagonal rows.
    """
    torch.manual_seed(0)
    fm = FlowMap(NETWORKS[name](image_size=32, channels=1, num_classes=10, **COST_NETWORKS[name]), base_std=0.5)
    x1, label = torch.randn(batch, 1, 32, 32), torch.arange(batch) % 10
    seconds: dict[str, list[float]] = {objective: [] for objective in COSTS}
    for step in range(rounds + 1):
        for key, objective in COSTS.items():
            draws = objective.draw(fm, x1, generator(0, "cost", step))
            start = time.process_time()
            objective.loss(fm, x1, label, draws).value.backward()  # type: ignore[no-untyped-call]
            seconds[key].append(time.process_time() - start)
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    for key, value in median.items():
        yield f"{name}, {key}", {"seconds": value, "/ flow_matching": value / median["flow_matching"]}


def checkerboard_scores(fm: FlowMap, n: int = 32_768) -> Scores:
    """KL and sliced W2 of ``n`` samples at 1 .. 16 steps: the map's, or Euler's for a drift."""
    true = load_arrays("checkerboard", "heldout").x[:n]
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
    for sampler, counts in (("euler", (1, 4, 64)), ("map", (1, 2, 4, 8))):
        if sampler == "map" and fm.info.kind == "drift":
            continue
        for count in counts:
            images = to_uint8(samples(fm, count, n, 1, sampler))
            scores[f"{sampler}@{count}"] = frechet_distance(extractor.stats(torch.split(images, 500)), heldout)
    return scores | {"floor": floor("digits", extractor, "")} | neighbours(images, "digits", "")


SUITES: dict[str, tuple[str, Callable[..., Scores]]] = {
    "checkerboard": ("configs/checkerboard.py", checkerboard_scores),
    "digits": ("configs/digits.py", digits_scores),
}


def run(
    suite: str,
    rows: list[str],
    seeds: list[int],
    train_steps: int | None = None,
    cpu_minutes: float | None = None,
    num: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one record a (row, seed): what was trained, for how long, and its scores."""
    if suite == "step":
        for row in rows:
            yield {"row": row, "seed": 0, "train_steps": 18, "scores": step_times("configs/digits.py", row)}
        return
    if suite == "cost":
        for name in COST_NETWORKS:
            yield from ({"row": row, "seed": 0, "scores": scores} for row, scores in objective_costs(name))
        return
    if suite not in SUITES:
        raise UserError(f"--suite={suite}: choose one of cost, step, {', '.join(SUITES)}")
    file, score = SUITES[suite]
    for row in rows:
        for seed in seeds:
            config = load_row(file, row)
            config.seed, config.steps = seed, train_steps or config.steps
            fm, facts = fit(config, cpu_minutes)
            yield {"row": row, "seed": seed, **facts, "scores": score(fm, num) if num else score(fm)}


def markdown(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a row: mean over seeds and half the range, of every score."""
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    facts = [key for key in ("train_steps", "cpu_minutes") if key in records[0]]
    lines = ["| | " + " | ".join([*facts, *names]) + " |", "|---" * (1 + len(facts) + len(names)) + "|"]
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        cells = [row, *(f"{statistics.mean(r[key] for r in mine):.4g}" for key in facts)]
        for name in names:
            values = [r["scores"][name] for r in mine if name in r["scores"]]
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
