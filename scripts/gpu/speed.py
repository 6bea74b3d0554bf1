"""Part c: images per second, relative to flow matching and to the card's peak; compiled or not; sampling; scoring."""

import functools
import gc
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.objectives import Work, medians
from benchmarks.scoring import model, prepare
from torch import Tensor

from flowmaps.distributed import pick_device
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.generate import generate
from flowmaps.objectives import OBJECTIVES
from gpu.made_up import build
from gpu.order import Item, Order
from gpu.rows import load
from samplers import uniform_times
from training.build import build_loss_module
from training.config import Precision, build_objective
from training.config_sections import CompileMode, DerivativePrecision
from training.forecast.ledger import Ledger
from training.forecast.report import CARDS
from training.precision import step_precision
from training.trainer import Trainer

BASE = "flow_matching"
NETWORKS = {  # name -> row of configs/ with its settings, micro-batch
    "DiT-XL/2": ("imagenet256:lagrangian", 32),
    "EDM2-S": ("imagenet64:lagrangian", 32),
    "U-Net": ("fashion_mnist:lagrangian", 256),
}
PEAKS = {**CARDS, "H200": CARDS["H100"]}  # the same chip with more memory
DERIVATIVES = ("bf16", "tf32", "fp32")
EAGER, COMPILED = 90.0, 150.0  # seconds of an item
SMOKE = {"DiT-XL/2", "U-Net"}


def items(order: Order) -> dict[str, Item]:
    """Eager steps first, network by network; compilations, which take minutes, last."""
    networks = [name for name in NETWORKS if name in SMOKE or not order.smoke]
    found: dict[str, Item] = {}
    for name in networks:
        steps = partial(training, name, order.smoke)
        found[f"{name}, {BASE}"] = Item(EAGER, partial(steps, BASE))
        for objective in ("lagrangian", "mean_flow"):
            for derivative in DERIVATIVES:
                work = partial(steps, objective, derivative_precision=DerivativePrecision[derivative])
                found[f"{name}, {objective}, derivative {derivative}"] = Item(EAGER, work)
        found[f"{name}, sampling"] = Item(EAGER, partial(sampling, name, order.smoke))
    found["fid.py, Inception"] = Item(EAGER, partial(scoring, 4 if order.smoke else 4096))
    for objective in (BASE,) if order.smoke else ("lagrangian", "mean_flow", BASE):
        for name in networks[:1] if order.smoke else reversed(networks):  # those with most launches first
            work = partial(training, name, order.smoke, objective, compile=True)
            found[f"{name}, {objective}, compiled"] = Item(COMPILED, work)
    if not order.smoke:
        work = partial(training, "U-Net", False, "lagrangian", compile=True, compile_mode=CompileMode.reduce_overhead)
        found["U-Net, lagrangian, compiled, reduce_overhead"] = Item(COMPILED, work)
    return found


@functools.lru_cache(maxsize=1)
def trainer_of(name: str, smoke: bool) -> Trainer:
    """Return the trainer of ``name`` by flow matching in bf16; only the latest one is kept."""
    gc.collect()
    file, micro = NETWORKS[name]
    config = load(file, smoke)
    config.objective, config.precision, config.accumulate = OBJECTIVES[BASE](), Precision.bf16, 1
    config.weight.learned, config.batch = False, min(micro, config.batch)
    return build(config)


def variant(base: Trainer, objective: str, **changes: Any) -> Trainer:
    """Return a trainer of the same weights and optimiser as ``base`` by another objective."""
    config = replace(base.config, objective=OBJECTIVES[objective](), **changes)
    config.validate()
    device, accelerator = base.accelerator.device, base.accelerator
    made = build_objective(config)
    module = build_loss_module(config, base.module.fm, made, None, device)
    wrapped = accelerator.prepare_model(module)
    return replace(base, config=config, module=module, wrapped=wrapped, precision=step_precision(config, made, device))


def training(name: str, smoke: bool, objective: str, **changes: Any) -> dict[str, Any]:
    """Time a step by ``objective`` next to an eager one by flow matching, interleaved."""
    base = trainer_of(name, smoke)
    device, size = base.accelerator.device, base.config.batch
    works: dict[str, Work] = {BASE: base.step}
    trainer = base
    if objective != BASE or changes:
        trainer = variant(base, objective, **changes)
        works["variant"] = trainer.step
    start = time.perf_counter()
    trainer.step(0)
    first = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    median = medians(works, rounds=2 if smoke else 9, warm=1 if smoke else 2, wall=True)
    seconds = median.get("variant", median[BASE])
    precision = {k: v for k, v in changes.items() if k == "derivative_precision"}
    counted = flops(name, smoke, objective, **precision)
    facts = {
        "images_per_second": size / seconds,
        "relative_to_flow_matching": seconds / median[BASE],
        "milliseconds": 1e3 * seconds,
        "first_step_seconds": first,
        "batch": size,
        **share_of_peak(counted, seconds),
    }
    if device.type == "cuda":
        facts["peak_GiB_of_both"] = torch.cuda.max_memory_allocated(device) / 2**30
    return facts


@functools.lru_cache
def flops(name: str, smoke: bool, objective: str, **changes: Any) -> dict[str, float]:
    """Count the FLOPs of the products in one eager step, by precision: "bf16", "TF32", "fp32"."""
    base = trainer_of(name, smoke)
    trainer = base if objective == BASE else variant(base, objective, **changes)
    with Ledger() as ledger:
        trainer.step(0)
    return dict(ledger.products)


def share_of_peak(counted: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return the TFLOP per second, and the time that they would take at the card's peaks over the measured time."""
    facts = {"TFLOP_per_second": sum(counted.values()) / seconds / 1e12}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if known := [peaks for name, peaks in PEAKS.items() if name in card]:
        facts["share_of_peak"] = sum(n / (1e12 * known[0][precision]) for precision, n in counted.items()) / seconds
    return facts


def sampling(name: str, smoke: bool) -> dict[str, Any]:
    """Time the map's sampler in 1 and 4 steps, noise included."""
    base = trainer_of(name, smoke)
    fm, batch = base.module.fm, base.config.batch
    fm.info = replace(fm.info, kind="map")  # of a drift the map cannot be sampled
    grids = {steps: uniform_times(steps) for steps in (1, 4)}

    def sample(times: Tensor, k: int) -> None:
        list(generate(fm, times, batch, k, batch=batch))

    works: dict[str, Work] = {str(steps): partial(sample, times) for steps, times in grids.items()}
    fm.eval()
    median = medians(works, rounds=2 if smoke else 7, warm=1, wall=True)
    fm.train()
    return {f"images_per_second, {steps} steps": batch / value for steps, value in median.items()}


def scoring(num: int) -> dict[str, Any]:
    """Time fid.py's pass with a small model and Inception of random weights: ``num`` images, and twice as many."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        fm, seconds = model().to(pick_device()), []
        reference = open_reference(Path(folder) / "stats.npz", "inception", Path(folder) / "weights.pth")
        for n in (num, num, 2 * num):  # the first is a warm-up
            start = time.perf_counter()
            evaluate(fm, reference, num=n, seeds=(0,))
            seconds.append(time.perf_counter() - start)
    more = seconds[2] - seconds[1]
    return {"images_per_second": num / more, "fixed_seconds": seconds[1] - more, "images": 2 * num}
