"""Bench of sources of images: the same pictures as a folder, a parquet file and tar shards, and by plain loaders.

A row runs in a separate process, in which it opens the pictures and reads all of them once in a shuffled order, cut
and resized, without workers. The plain loaders are those of ``datasets`` and ``webdataset`` with transforms of
torchvision.
"""

import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.folders import BATCH, write_files
from flowmaps import UserError
from flowmaps.data import ShuffledOrder, open_dataset

SIDE, SIZE, SHARD = 128, 64, 1000  # pixels of the JPEGs and of what is read, samples of a shard
Open = Callable[[Path], Iterator[Tensor]]


def ours(source: str) -> Open:
    def read(folder: Path) -> Iterator[Tensor]:
        data = open_dataset(source.format(folder), size=SIZE)
        order = ShuffledOrder(len(data), seed=0)
        yield from (data.fetch(order.indices(k, min(BATCH, len(data) - k)))[0] for k in range(0, len(data), BATCH))

    return read


def transform() -> Any:
    from torchvision import transforms

    return transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()])


def plain_datasets(folder: Path) -> Iterator[Tensor]:
    import datasets

    rows, change = datasets.load_dataset(str(folder / "parquet"), split="train"), transform()
    order = torch.randperm(len(rows)).tolist()
    for k in range(0, len(order), BATCH):
        yield torch.stack([change(rows[i]["image"]) for i in order[k : k + BATCH]])


def plain_webdataset(folder: Path) -> Iterator[Tensor]:
    import webdataset

    shards, change = sorted(str(file) for file in (folder / "tars").glob("*.tar")), transform()
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
    batch: list[Tensor] = []
    for sample in samples:
        batch.append(change(sample["jpg"]))
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


SOURCES: dict[str, Open] = {
    "folder": ours("{}/folder"),
    "hf": ours("hf:{}/parquet"),
    "wds": ours("wds:{}/tars"),
    "datasets": plain_datasets,
    "webdataset": plain_webdataset,
}


def write_sources(folder: Path, num: int) -> None:
    """Write ``num`` JPEGs of ``SIDE`` pixels to ``folder``: as files, in a parquet file, and in shards."""
    import datasets

    write_files(folder / "folder", num, "jpeg", SIDE)
    files = sorted((folder / "folder").rglob("*.jpeg"), key=lambda file: file.name)
    label = [int(file.parent.name) for file in files]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": label}
    (folder / "parquet").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet" / "train.parquet")
    (folder / "tars").mkdir()
    for start in range(0, num, SHARD):
        with tarfile.open(folder / "tars" / f"train-{start // SHARD:03d}.tar", "w") as archive:
            for i in range(start, min(start + SHARD, num)):
                for suffix, content in (("jpg", files[i].read_bytes()), ("cls", str(label[i]).encode())):
                    entry = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def measure(row: str, folder: Path, threads: int) -> tuple[float, float, float]:
    """Return CPU seconds and MiB of private memory up to the first batch, and images per CPU second of the others.

    The processor's time, unlike that of the clock, does not show what else the machine does.
    """
    torch.set_num_threads(threads)
    list(SOURCES["folder"](folder / "warm"))  # what all rows load
    before, clock = private(), time.process_time()
    batches = SOURCES[row](folder)
    next(batches)
    first, memory, clock = time.process_time() - clock, private() - before, time.process_time()
    count = sum(len(batch) for batch in batches)
    return first, memory, count / (time.process_time() - clock)


def private() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def source_times(row: str, num: int | None = None) -> dict[str, float]:
    """Return the scores of a row of ``SOURCES`` with ``num`` pictures, 10,000 by default."""
    if row not in SOURCES:
        raise UserError(f"--rows={row}: choose from {', '.join(SOURCES)}")
    with tempfile.TemporaryDirectory() as place:
        folder, caches = Path(place), {"XDG_CACHE_HOME": place, "HF_DATASETS_CACHE": f"{place}/datasets"}
        with mock.patch.dict(os.environ, caches):
            write_sources(folder, num or 10_000)
            write_files(folder / "warm" / "folder", 10, "jpeg", SIDE)
            found = []
            for _ in range(2):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found.append(pool.apply(measure, (row, folder, torch.get_num_threads())))
    (first, *_), (again, memory, speed) = found
    return {"first start, CPU s": first, "later start, CPU s": again, "memory, MiB": memory, "images/CPU s": speed}
