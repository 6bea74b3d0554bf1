"""Writing data sets to disk once, in shards, so that a stopped call goes on where it was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from flowmaps import UserError
from flowmaps.files import sha256, write_file
from flowmaps.images import from_uint8
from training.config import Start
from training.data import DataSet, Order
from training.data.trajectories import FORMAT, shard_name
from training.walk import Walk, described, grid


def write_trajectories(
    out: Path, walk: Walk, num: int, seed: int, batch: int = 256, shard: int = 1024, data: DataSet | None = None
) -> Iterator[int]:
    """Write ``num`` trajectories to the directory ``out``; yields how many are there, shard by shard.

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
        "format": FORMAT,
        "num": num,
        "shard": shard,
        "shape": list(teacher.info.shape),
        "num_classes": classes,
        "interpolant": teacher.interpolant_name,
        "base_std": teacher.base_std,
        "teacher": teacher.fingerprint(),
        "data": data.digest() if data is not None else "",
        "seed": seed,
        "times": grid(options).tolist(),
        "made": described(options),
    }
    out.mkdir(parents=True, exist_ok=True)
    _same_set(out / "trajectories.json", facts)
    order, checksums = Order(len(data), seed) if data is not None else None, {}
    device = next(teacher.parameters()).device
    for number, start in enumerate(range(0, num, shard)):
        file = out / shard_name(number)
        stop = min(start + shard, num)
        if not file.is_file():
            states, labels = [], []
            for first in range(start, stop, batch):
                count = min(batch, stop - first)
                x1, label = None, torch.arange(first, first + count) % classes if classes else None
                if data is not None and order is not None:
                    x1, given = data.fetch(order.indices(first, count))
                    x1 = (from_uint8(x1) if x1.dtype == torch.uint8 else x1).to(device)
                    label = given if classes else None
                label = None if label is None else label.to(device)
                made = walk(teacher.noise(count, seed, start=first), x1, label).states
                if not bool(torch.isfinite(made).all()):
                    raise UserError(f"the trajectories {first} .. {first + count - 1} are not finite: try another grid")
                states.append(made.transpose(0, 1).float().cpu())
                labels += [] if label is None else [label.cpu()]
            tensors = {"states": torch.cat(states).contiguous()} | ({"label": torch.cat(labels)} if labels else {})
            write_file(file, save(tensors))
        checksums[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        yield stop
    write_file(out / "checksums.json", json.dumps(checksums, indent=1).encode())


def _same_set(path: Path, facts: dict[str, Any]) -> None:
    """Write ``facts`` to ``path``; if another set is there, refuse to mix the two."""
    try:
        stored = json.loads(path.read_text()) if path.exists() else facts
        changed = [key for key in facts if stored[key] != facts[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): use a new --out") from None
    if changed:
        raise UserError(
            f"--out={path.parent} has trajectories of another {changed[0]} ({stored[changed[0]]}, now "
            f"{facts[changed[0]]}): use a new --out"
        )
    write_file(path, json.dumps(facts, indent=1).encode())
