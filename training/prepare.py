"""A teacher's trajectories on disk."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps import UserError
from flowmaps.rng import generator
from training.config import Start
from training.data import DataSet, Order, as_samples
from training.shards import begin, complete
from training.walk import Walk, described, grid


def write_trajectories(
    out: Path, walk: Walk, num: int, seed: int, batch: int = 256, shard: int = 1024, data: DataSet | None = None
) -> Iterator[tuple[int, int]]:
    """Write ``num`` trajectories to the directory ``out``; yields (shards made, shards to make).

    Trajectory i has the noise of sample i at this seed, and with ``data`` (for start=data) the image at position i of
    their shuffled order and its label; otherwise its label is i mod classes. A shard that is there is kept.
    """
    teacher, options = walk.teacher, walk.options
    if (data is None) == (options.start is Start.data):
        raise UserError("trajectories start from data if and only if there are any: --start=data goes with --data=NAME")
    classes = teacher.info.num_classes
    if data is not None and (data.shape, data.num_classes if classes else 0) != (teacher.info.shape, classes):
        raise UserError(
            f"--data has samples of shape {data.shape} and {data.num_classes} classes, --teacher "
            f"{teacher.info.shape} and {classes}"
        )
    facts: dict[str, Any] = {
        "num": num,
        "shard": shard,
        "shape": list(teacher.info.shape),
        "num_classes": classes,
        "interpolant": teacher.interpolant_name,
        "base_std": teacher.base_std,
        "teacher": teacher.fingerprint(),
        "guidance": teacher.info.guidance,
        "data": data.digest() if data is not None else "",
        "seed": seed,
        "times": grid(options).tolist(),
        "made": described(options),
    }
    total = math.ceil(num / shard)
    missing = begin(out, "trajectories", facts, total)
    order = Order(len(data), seed) if data is not None else None
    device = next(teacher.parameters()).device

    def make(number: int) -> tuple[dict[str, Tensor], list[str]]:
        states, labels = [], []
        stop = min((number + 1) * shard, num)
        for first in range(number * shard, stop, batch):
            count = min(batch, stop - first)
            x1, label = None, torch.arange(first, first + count) % classes if classes else None
            if data is not None and order is not None:
                x1, given = data.fetch(order.indices(first, count))
                x1 = as_samples(data, x1.to(device), partial(_noise, seed, first, device))
                label = given if classes else None
            label = None if label is None else label.to(device)
            made = walk(teacher.noise(count, seed, start=first), x1, label).states
            if not bool(torch.isfinite(made).all()):
                raise UserError(f"the trajectories {first} .. {first + count - 1} are not finite: try another grid")
            states.append(made.transpose(0, 1).float().cpu())
            labels += [] if label is None else [label.cpu()]
        return {"states": torch.cat(states).contiguous()} | ({"label": torch.cat(labels)} if labels else {}), []

    yield from complete(out, total, missing, make)


def _noise(seed: int, first: int, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Noise of items ``first``, ``first + 1``, ...: [n, ...] as ``shape``, the same for any batch size."""
    rows = [torch.randn(shape[1:], generator=generator(seed, "latents", first + i)) for i in range(shape[0])]
    return torch.stack(rows).to(device)
