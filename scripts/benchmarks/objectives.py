"""Bench of objectives: time and memory of loss and gradient, by objective and network."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.derivatives import velocity_jvp
from flowmaps.networks import NETWORKS, PRESETS
from flowmaps.objectives import (
    FACM,
    AlphaFlow,
    Consistency,
    Draws,
    Eulerian,
    FlowMatching,
    ImprovedMeanFlow,
    Lagrangian,
    Loss,
    MeanFlow,
    Objective,
    Progressive,
    SoFlow,
)
from flowmaps.objectives.base import mean_square
from flowmaps.objectives.eulerian import StopGradient
from flowmaps.objectives.lagrangian import Derivative
from flowmaps.rng import generator
from samplers.callables import Drift, expand


@dataclass
class Unsplit(Lagrangian):
    """Lagrangian self-distillation as one expression over all rows, with t - s = 0 on the diagonal: the reference form.

    The package splits the batch instead, since a row with s = t needs no derivative.
    """

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        x0, s, t = draws.x0, draws.s, draws.t
        x, velocity = fm.interpolant.point(x0, x1, s), fm.interpolant.conditional_velocity(x0, x1, s)
        v, dv = velocity_jvp(fm, x, s, t, label, dt=1.0)
        gap = expand(t - s, x)
        with torch.no_grad():
            target = torch.where(gap == 0, velocity, fm.drift(x + gap * v, t, label))
        return mean_square(v + gap * dv - target)


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
    "eulerian, slim": Eulerian(stop=StopGradient.slim),
    "soflow": SoFlow(),
    "alpha_flow": AlphaFlow(),
    "consistency": Consistency(),
    "facm": FACM(),
}
_IMAGES = {"image_size": 32, "channels": 1, "num_classes": 10}
_NARROW = {**_IMAGES, "width": 32, "channel_mult": (1, 2, 2), "blocks": 1, "attention_resolutions": (8,)}
COST_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # besides PRESETS, which need a GPU
    "UNet": ("UNet", _NARROW),
    "EDM2UNet": ("EDM2UNet", _NARROW),
    "DiT": ("DiT", {**_IMAGES, "patch": 4, "width": 192, "depth": 6, "heads": 3}),
}


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors that ``work`` has allocated at a time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


Work = Callable[[int], Any]  # of round k


def medians(works: dict[str, Work], rounds: int, warm: int = 3, wall: bool = False) -> dict[str, float]:
    """Seconds of each work, which are done in turn, after ``warm`` rounds that compile and fill caches.

    ``wall``: of the clock on the wall on a CPU too, for work that waits for a disk.
    """
    clock = time.perf_counter if wall or torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for k in range(warm + rounds):
        for name, work in works.items():
            start = clock()
            work(k)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values[warm:]) for name, values in seconds.items()}


Step = Callable[[Objective, Callable[..., Loss], int], None]  # (objective, its loss, number of the step)


def loss_and_gradient(name: str, batch: int = 32, bf16: bool = False) -> tuple[torch.device, Step]:
    """Return a step of the network ``name``, a row of COST_NETWORKS or PRESETS, without an optimiser, and its device.

    On ``batch`` images of its shape; with autocast to bfloat16 if ``bf16``, and always on a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in COST_NETWORKS and name not in PRESETS:
        raise UserError(f"--rows={name}: choose from {', '.join([*COST_NETWORKS, *PRESETS])}")
    torch.manual_seed(0)
    cls, options = COST_NETWORKS.get(name) or PRESETS[name][:2]
    network = NETWORKS[cls](**options).to(device)
    fm, config = FlowMap(network, base_std=0.5), network.config
    x1 = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    label = torch.arange(batch, device=device) % config.num_classes if config.num_classes else None

    def work(objective: Objective, loss: Callable[..., Loss], step: int) -> None:
        draws = objective.draw(fm, x1, generator(0, "cost", step, device=device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16 or device.type == "cuda"):
            value = loss(fm, x1, label, draws).value
        value.backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return device, work


def network_costs(name: str, rounds: int = 7, batch: int = 32) -> Iterator[tuple[str, dict[str, float]]]:
    """Time and memory of ``loss_and_gradient`` for every objective at its own share of diagonal rows.

    With "+compile" behind the name, for flow matching and Lagrangian alone, eager and compiled; with "+bf16" under
    autocast. Medians of interleaved rounds in one process: on the CPU of process time; on a GPU of wall time, all of
    them compiled too.
    """
    network, *options = name.split("+")
    if unknown := set(options) - {"compile", "bf16"}:
        raise UserError(f"--rows={name}: {unknown.pop()} is neither compile nor bf16")
    plus = "compile" in options
    device, step = loss_and_gradient(network, batch, "bf16" in options)
    objectives = {key: COSTS[key] for key in ("flow_matching", "lagrangian")} if plus else COSTS
    losses: dict[str, Callable[..., Any]] = {key: objective.loss for key, objective in objectives.items()}
    if plus or device.type == "cuda":
        losses |= {f"{key}, compiled": torch.compile(objective.loss) for key, objective in objectives.items()}

    def work(key: str, k: int) -> None:
        step(COSTS[key.removesuffix(", compiled")], losses[key], k)

    median = medians({key: functools.partial(work, key) for key in losses}, rounds, warm=1)
    for key, value in median.items():
        memory = peak_memory(functools.partial(work, key, 0), device) / 2**30
        scores = {"images/s": batch / value, "GiB": memory, "time / flow_matching": value / median["flow_matching"]}
        yield f"{name.replace('+compile', '')}, {key}", scores
