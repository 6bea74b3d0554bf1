"""What a training step costs: by objective and network, and by precision, memory layout and compilation."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from flowmaps import FlowMap
from flowmaps.derivatives import velocity_jvp
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
from training.config import Precision, load_row
from training.trainer import CHANNELS_LAST, Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": Precision.bf16},
    "channels_last": {"channels_last": True},
    "accumulate 2": {"accumulate": 2},
    "compile": {"compile": True},
}


def step_times(file: str, row: str, rounds: int = 15) -> dict[str, float]:
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


def objective_costs(name: str, rounds: int = 7, batch: int = 32) -> Iterator[tuple[str, dict[str, float]]]:
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
