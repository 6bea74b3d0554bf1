"""Part b: a few steps of rows of configs/ at their full size, and the peak of memory next to the forecast."""

import gc
import importlib
import itertools
import math
import statistics
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.objectives import peak_memory

from gpu.forecasts import started
from gpu.made_up import build
from gpu.order import Item, Order
from training.build import build_loader
from training.config import Config
from training.config_rows import Chain
from training.trainer import Trainer

LIMIT = 150.0  # seconds; a network of 1.5 billion parameters and its teacher take most of it to be made
STEPS = 3

# row of configs/ (FILE:ROW/STAGE: a stage of a chain) -> micro-batch for 80 GiB by the forecast, halved until it fits
ROWS = {
    "cifar10:lagrangian": 128,
    "imagenet64:lagrangian": 64,
    "imagenet256:mean_flow": 64,
    "imagenet256:lagrangian": 32,
    "imagenet512:cmt/mid_training": 16,  # the rows of one trajectory at least
    "imagenet512:cmt/post_training": 16,
    "cifar10:lagrangian,ddpmpp": 128,
}


def items(order: Order) -> dict[str, Item]:
    todo = {name: size for name, size in ROWS.items() if name not in order.skip}
    forecast = started(dict(list(todo.items())[: 1 if order.smoke else None]))
    return {
        name: Item(LIMIT, partial(row, name, micro, order.smoke, forecast.get(name))) for name, micro in ROWS.items()
    }


def load(name: str, smoke: bool) -> Config:
    """Load the config of ``name``, a key of ROWS."""
    choice, _, stage = name.partition("/")
    file, _, row = choice.partition(":")
    made = importlib.import_module(f"configs.{file}").get_config(f"{row},smoke" if smoke else row)
    config: Config = made.stages()[stage] if isinstance(made, Chain) else made
    return config


def with_micro_batch(trainer: Trainer, size: int) -> None:
    """Let the steps of ``trainer`` take ``size`` rows, without building its weights anew."""
    trainer.config = replace(trainer.config, batch=size, accumulate=1)
    trainer.loader = build_loader(trainer.config, trainer.accelerator, trainer.data, trainer.paths, size)


def row(name: str, micro: int, smoke: bool, forecast: Future[dict[str, Any]] | None) -> dict[str, Any]:
    """Take steps of the row with the largest micro-batch ``micro``, micro / 2, ... that fits.

    The ``forecast`` of the peak is for ``micro`` rows at full size.
    """
    config = load(name, smoke)
    size = min(micro, config.batch)
    start = time.perf_counter()
    trainer = build(replace(config, batch=size, accumulate=1))
    facts: dict[str, Any] = {
        "millions": sum(p.numel() for p in trainer.module.fm.network.parameters()) / 1e6,
        "build_seconds": time.perf_counter() - start,
        "precision": trainer.config.precision.name,
        "derivative": str(trainer.precision.derivative).removeprefix("torch."),
        "tf32": trainer.precision.tf32,
    }
    least = trainer.paths.rows if trainer.paths else 4
    while True:
        try:
            measured = steps(trainer)
        except torch.OutOfMemoryError:
            measured = None
        if measured is not None or size // 2 < least:
            break
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.latest = None
        gc.collect()
        torch.cuda.empty_cache()
        size //= 2
        with_micro_batch(trainer, size)
    if measured is None:
        raise MemoryError(f"not even {size} rows fit")
    return facts | {"micro_batch": size, **measured, **(forecast.result() if forecast else {})}


def steps(trainer: Trainer) -> dict[str, Any]:
    """Take STEPS steps; the first is a warm-up, in which the optimiser makes its state."""
    device, size = trainer.accelerator.device, trainer.config.batch
    losses: list[float] = []

    def step() -> None:
        losses.append(float(trainer.step(len(losses))["loss"]))

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(STEPS - 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = fixed_bytes(trainer) + peak_memory(step, device)
    if not all(math.isfinite(loss) for loss in losses):
        raise FloatingPointError(f"losses {losses}")
    rate = size / statistics.median(seconds)
    return {"losses": losses, "images_per_second": rate, "peak_GiB": peak / 2**30}


def fixed_bytes(trainer: Trainer) -> int:
    """Count what is allocated between two steps: weights, teacher, averages, and the optimiser's state."""
    teacher = trainer.module.teacher
    networks = itertools.chain(trainer.module.parameters(), () if teacher is None else teacher.parameters())
    averages = (v for shadow in trainer.ema.shadows.values() for v in shadow.values())
    state = (v for entry in trainer.optimizer.state.values() for v in entry.values())
    return sum(t.nbytes for t in itertools.chain(networks, averages, state) if isinstance(t, torch.Tensor))
