"""Bench of overhead: the package's own code next to the network, per step, sample, average and checkpoint.

All timings are medians over interleaved rounds in one process, after a warm-up: process time on a CPU, which other
programs disturb less, and wall time on a GPU, for which the host waits.
"""

import itertools
import os
import platform
import re
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from benchmarks.objectives import COST_NETWORKS, COSTS, Work, medians
from benchmarks.rows import row_config
from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.distributed import pick_device
from flowmaps.generate import generate
from flowmaps.images import from_uint8
from flowmaps.networks import NETWORKS
from flowmaps.rng import generator
from samplers import euler, rollout, uniform_times
from training.checkpoint import load_checkpoint
from training.config import Config, Precision
from training.ema import EMA
from training.trainer import Trainer

Scores = dict[str, float]

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": Precision.bf16},
    "channels_last": {"channels_last": True},
    "accumulate 2": {"accumulate": 2},
    "compile": {"compile": True},
}


def machine() -> dict[str, Any]:
    """Return facts of the machine on which a record is made."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    device = pick_device()
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("flowmaps", "torch", "diffusers", "accelerate")},
        "python": platform.python_version(),
    }


def _trainer(config: Config) -> Trainer:
    AcceleratorState._reset_state()  # one process, several precisions
    return Trainer.build(config)


def step_times(row: str, rounds: int = 15) -> Scores:
    """Seconds of a training step; ratios to it of its variants; and its own to a bare loop's and flow matching's."""
    trainers = {"flow_matching": _trainer(row_config("flow_matching" + row[len(row.partition("+")[0]) :]))}
    for name, changes in VARIANTS.items():
        trainers[name] = _trainer(row_config(row, **changes))
    works: dict[str, Work] = {name: lambda k, t=t: float(t.step(k)["loss"]) for name, t in trainers.items()}  # type: ignore[misc]
    works["bare loop"] = bare_loop(row_config(row))
    median = medians(works, rounds)
    scores = {"fp32 s": median.pop("fp32")}
    for name in ("flow_matching", "bare loop"):
        scores[f"fp32 / {name}"] = scores["fp32 s"] / median.pop(name)
    return scores | {f"{name} / fp32": value / scores["fp32 s"] for name, value in median.items()}


def bare_loop(config: Config) -> Work:
    """The least that training by this objective needs: batch, draws, loss, backward, clipping, optimiser."""
    trainer = _trainer(config)
    fm, objective, parameters = trainer.module.fm, trainer.module.objective, list(trainer.module.parameters())
    optimizer, device = trainer.optimizer, trainer.accelerator.device

    def work(k: int) -> float:
        x1, label = trainer.loader.batch(k)
        x1, label = from_uint8(x1.to(device)), None if label is None else label.to(device)
        draws = objective.draw(fm, x1, generator(0, "draws", k, device=device), k)
        loss = objective.loss(fm, x1, label, draws)
        loss.value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.value)

    return work


def _flow_map(name: str) -> FlowMap:
    if name not in COST_NETWORKS:
        raise UserError(f"--rows={name}: choose from {', '.join(COST_NETWORKS)}")
    cls, options = COST_NETWORKS[name]
    torch.manual_seed(0)
    info = FlowMapInfo(shape=(1, 32, 32), num_classes=10)
    return FlowMap(NETWORKS[cls](**options).eval(), base_std=0.5, info=info).to(pick_device())


def layout_times(name: str, rounds: int = 11) -> Scores:
    """Time of loss and gradient, and of a forward pass, in the channels-last layout relative to the usual one."""
    works: dict[str, Work] = {}
    for prefix, layout in (("usual ", torch.contiguous_format), ("", torch.channels_last)):
        fm = _flow_map(name).to(memory_format=layout)
        x = fm.noise(32, seed=0).contiguous(memory_format=layout)
        label = torch.arange(len(x), device=x.device) % 10
        for row in ("flow_matching", "mean_flow", "lagrangian"):
            works[prefix + row] = partial(_loss_and_gradient, fm, x, label, row)
        works[f"{prefix}forward"] = partial(_forward, fm, x, label)
    median = medians(works, rounds)
    return {row: median[row] / median[f"usual {row}"] for row in works if not row.startswith("usual ")}


def _loss_and_gradient(fm: FlowMap, x: torch.Tensor, label: torch.Tensor, row: str, k: int) -> None:
    draws = generator(0, "cost", k, device=x.device)
    COSTS[row](fm, x, label, generator=draws).value.backward()  # type: ignore[no-untyped-call]
    fm.zero_grad(set_to_none=True)


@torch.no_grad()
def _forward(fm: FlowMap, x: torch.Tensor, label: torch.Tensor, k: int) -> None:
    zero = torch.zeros(len(x), device=x.device)
    fm(x, zero, zero + 1, label)


def sample_times(name: str, rounds: int = 7, batch: int = 32) -> Scores:
    """Images per second of the map's sampler; ratios to as many bare forward passes of the network."""
    fm = _flow_map(name)
    x = fm.noise(batch, seed=0)
    zero, label = torch.zeros(batch, device=x.device), torch.arange(batch, device=x.device) % 10

    def forwards(count: int) -> Work:
        def work(k: int) -> None:
            with torch.no_grad():
                for _ in range(count):
                    fm.network(x, zero, zero + 1, label)

        return work

    works: dict[str, Work] = {}
    for steps in (1, 4):
        times = uniform_times(steps)
        works[f"forward@{steps}"] = forwards(steps)
        works[f"sampler@{steps}"] = lambda k, times=times: rollout(fm, x, times, label)  # type: ignore[misc]
        works[f"euler@{steps}"] = lambda k, times=times: euler(fm.drift, x, times, label)  # type: ignore[misc]
        works[f"noise and sampler@{steps}"] = lambda k, times=times: list(generate(fm, times, batch, k))  # type: ignore[misc]
    with torch.no_grad():
        median = medians(works, rounds)
    scores = {f"images/s@{steps}": batch / median[f"noise and sampler@{steps}"] for steps in (1, 4)}
    for kind, steps in itertools.product(("sampler", "euler", "noise and sampler"), (1, 4)):
        scores[f"{kind} / forward@{steps}"] = median[f"{kind}@{steps}"] / median[f"forward@{steps}"]
    return scores


def ema_times(row: str, rounds: int = 30) -> Scores:
    """Milliseconds of an update of one, two and three averages, and their share of a training step without any."""
    config = row_config(row)
    trainer = _trainer(config)
    fm, bare = trainer.module.fm, bare_loop(config)
    kinds = {1: ((0.999,), ()), 2: ((), (0.05, 0.1)), 3: ((0.999,), (0.05, 0.1))}
    averages = {count: EMA(fm.network, *kind) for count, kind in kinds.items()}
    works: dict[str, Work] = {"step": bare}
    works |= {str(count): lambda k, a=a: a.update(k + 1) for count, a in averages.items()}  # type: ignore[misc]
    median = medians(works, rounds)
    milliseconds = {f"ms@{count}": 1e3 * median[str(count)] for count in averages}
    return milliseconds | {f"share of a step@{count}": median[str(count)] / median["step"] for count in averages}


def resume_times(row: str, rounds: int = 5) -> Scores:
    """Seconds of writing and of reading a checkpoint, in steps too; its size; and that what is read is what was."""
    trainer, other = (_trainer(row_config(row)) for _ in range(2))
    trainer.step(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000001"

        def read(k: int) -> None:
            load_checkpoint(path, other.module, other.optimizer, other.ema)

        works: dict[str, Work] = {"step": trainer.step, "write": lambda k: trainer.checkpoint(path, 1), "read": read}
        median = medians(works, rounds, wall=True)
        size = sum(file.stat().st_size for file in path.iterdir())
    losses = [float(t.step(1)["loss"]) for t in (trainer, other)]
    scores = {f"{name} s": median[name] for name in ("write", "read")}
    scores |= {f"{name} / step": median[name] / median["step"] for name in ("write", "read")}
    return scores | {"MiB": size / 2**20, "next loss differs by": abs(losses[0] - losses[1])}
