"""Part d: train configs/fashion_mnist.py:lagrangian in bf16 for the time that is left, and score it."""

import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, open_dataset
from flowmaps.distributed import pick_device
from flowmaps.evaluation import evaluate
from flowmaps.files import write_json
from flowmaps.reading import parse
from gpu.made_up import ITEMS, data_for
from gpu.order import Item, Order, Unavailable
from gpu.rows import load
from training.config import Config, Precision
from training.log import read_log
from training.loop import train
from training.run_directory import is_run, read_config
from training.trainer import Trainer

RESERVE = 45.0  # seconds for scoring
STEPS = (1, 2, 4, 8)
SEED = 2  # of the score, as in docs/performance.md


def items(order: Order) -> dict[str, Item]:
    left = max(1.0, order.seconds_left())
    return {"train": Item(left, partial(training, order)), "score": Item(left, partial(scoring, order))}


def workdir(order: Order) -> Path:
    """Return the directory of the run; its checkpoints are too large for ``order.out``."""
    return Path("runs") / f"gpu-{order.run}"


def row(order: Order) -> tuple[Config, DataSet]:
    """Return the config and its data: those of ``order.data``, or in a smoke run made-up ones."""
    config = load("fashion_mnist:lagrangian", order.smoke)
    config.precision, config.data.root = Precision.bf16, order.data
    if order.smoke:
        return config, data_for(config)
    try:
        return config, open_dataset("fashion_mnist", root=order.data, size=32)
    except UserError as error:
        raise Unavailable(f"{error} (make gpu DATA=DIR)") from None


def training(order: Order) -> dict[str, Any]:
    """Train for the time that is left, or resume the run that an earlier call began."""
    config, data = row(order)
    folder = workdir(order)
    begun = folder / "config.json"
    if begun.exists():
        config.steps = parse(int, read_config(begun).get("steps"), f"{begun}: steps")
    elif not order.smoke:
        config.steps = int(0.9 * (order.seconds_left() - RESERVE) / seconds_per_step(config, data))
        if config.steps < config.log_every:
            raise Unavailable(f"time for {max(0, config.steps)} steps only")
    if not order.smoke:
        config.optim.warmup = min(config.optim.warmup, config.steps // 10)
        config.sample_every = config.checkpoint_every = max(1, config.steps // 2)
    AcceleratorState._reset_state()
    start = time.perf_counter()
    model = train(config, folder, data)
    seconds = time.perf_counter() - start
    out = Path(order.out)
    rows = read_log(folder / "log.jsonl")
    write_json(out / "log.json", rows)
    model.network.half()  # 13 MB instead of 26
    model.save_pretrained(out / "model")
    rates = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    return {
        "steps": config.steps,
        "batch": config.batch,
        "training_seconds": seconds,
        "images_per_second": statistics.median(rates),
    }


def seconds_per_step(config: Config, data: DataSet, warm: int = 5, steps: int = 20) -> float:
    """Time a few steps of a trainer that is then dropped."""
    AcceleratorState._reset_state()
    trainer = Trainer.build(config, data)
    for step in range(warm + steps):
        if step == warm:
            start = time.perf_counter()
        float(trainer.step(step)["loss"])
    return (time.perf_counter() - start) / steps


def scoring(order: Order) -> dict[str, Any]:
    """Return the distance to the held-out images by step count, of the model in ``order.out``; drop the run."""
    try:
        fm = FlowMap.from_pretrained(Path(order.out) / "model").to(pick_device()).eval()
    except UserError as error:
        raise Unavailable(str(error)) from None
    options: dict[str, Any] = {"steps": STEPS, "num": 64 if order.smoke else 5000, "seeds": (SEED,)}
    options |= {"schedule": "uniform", "root": order.data}
    start = time.perf_counter()
    if order.smoke:
        with tempfile.TemporaryDirectory() as folder:
            images = torch.randint(256, (ITEMS, 32, 32, 1), dtype=torch.uint8)
            np.savez(reference := Path(folder) / "images.npz", samples=images.numpy())
            record = evaluate(fm, reference, extractor="fashion_mnist", **options)
    else:
        record = evaluate(fm, "fashion_mnist:heldout", **options)
    if is_run(workdir(order)):
        shutil.rmtree(workdir(order), ignore_errors=True)
    scores = {f"{record['metric']}, {row['steps']} steps": row[record["metric"]] for row in record["results"]}
    return {**scores, "samples": options["num"], "scoring_seconds": time.perf_counter() - start}
