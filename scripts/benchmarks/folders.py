"""Bench of image folders: images/s next to torchvision's ImageFolder, and the time to open a folder of many files.

The images are made in a temporary folder. Both readers decode, cut the centre, resize it and give floats in one
process; they take turns by batches, so that what else the machine does meets both.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.objectives import Work, medians
from flowmaps import UserError
from flowmaps.data import open_images
from flowmaps.images import from_uint8

BATCH, CLASSES, DIFFERENT = 64, 10, 100
FOLDERS = {"jpeg64": 20_000, "jpeg256": 20_000, "opening": 100_000}  # row -> files by default


def write_files(folder: Path, num: int, suffix: str, side: int) -> None:
    """Write ``num`` pictures, smooth with some noise, in ``CLASSES`` folders; ``DIFFERENT`` of them differ."""
    random, contents = np.random.default_rng(0), []
    for _ in range(min(num, DIFFERENT)):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        noisy = smooth + random.normal(0, 10, smooth.shape)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, suffix)
        contents.append(buffer.getvalue())
    for i in range(num):
        file = folder / f"{i % CLASSES}" / f"{i:08d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[i % len(contents)])


def reading(folder: Path, num: int, size: int) -> dict[str, float]:
    """Images/s of both readers at ``size`` pixels, and their ratio: medians over batches."""
    write_files(folder, num, "jpeg", 256)
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    theirs, ours = ImageFolder(folder, transforms.Compose(steps)), open_images(folder, size)

    def read_ours(index: Tensor) -> Tensor:
        return from_uint8(ours.fetch(index)[0])

    def read_theirs(index: Tensor) -> Tensor:
        return torch.stack([theirs[i][0] for i in index.tolist()])

    def batches(read: Callable[[Tensor], Tensor]) -> Work:
        return lambda k: read(torch.arange(k * BATCH, (k + 1) * BATCH) % num)

    median = medians({"flowmaps": batches(read_ours), "torchvision": batches(read_theirs)}, -(-num // BATCH))
    speed = {f"{name}, images/s": BATCH / seconds for name, seconds in median.items()}
    return speed | {"flowmaps / torchvision": median["torchvision"] / median["flowmaps"]}


def opening(folder: Path, num: int, rounds: int = 3) -> dict[str, float]:
    """Seconds, on the clock and of all cores, to open ``num`` PNG files of 32 x 32: first, again, by torchvision."""
    write_files(folder, num, "png", 32)
    works: dict[str, Callable[[], object]] = {
        "first": lambda: open_images(folder, 32),
        "again": lambda: open_images(folder, 32),
        "torchvision": lambda: ImageFolder(folder),
    }
    seconds: dict[str, list[float]] = {f"{name}, {kind}": [] for name in works for kind in ("s", "CPU s")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
            for name, work in works.items():
                clock, cores = time.perf_counter(), time.process_time()
                work()
                seconds[f"{name}, s"].append(time.perf_counter() - clock)
                seconds[f"{name}, CPU s"].append(time.process_time() - cores)
    return {name: statistics.median(values) for name, values in seconds.items()}


def folder_times(row: str, num: int | None = None) -> dict[str, float]:
    """Return the scores of a row of ``FOLDERS``, with ``num`` files instead of the row's own number."""
    if row not in FOLDERS:
        raise UserError(f"--rows={row}: choose from {', '.join(FOLDERS)}")
    num = num or FOLDERS[row]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        images = Path(folder) / "images"
        return opening(images, num) if row == "opening" else reading(images, num, int(row.removeprefix("jpeg")))
