"""Draw samples, show them as grids, write them to disk."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowmaps.data import DataSet, ShuffledOrder, as_samples
from flowmaps.errors import UserError
from flowmaps.files import WRITER, WRITTEN_BY, Layout, finite, lock_later, new_directory, new_file
from flowmaps.flow_map import FlowMap
from flowmaps.generate import generate
from flowmaps.images import COLUMNS, png, sample_grid, to_pil, to_uint8
from flowmaps.markdown import counted
from flowmaps.rng import generator
from samplers.grids import uniform_times

RECORD = "record"  # key of an archive of samples that a model did not make alone
PICTURES = Layout("000000.png", b"tEXtSoftware\0flowmaps", ("[0-9]*.png",))
GRID = 8192  # samples that a grid may need: a point cloud takes many


def write_samples(
    batches: Iterable[tuple[Tensor, Tensor | None]], out: Path, count: int, record: dict[str, Any] | None = None
) -> Tensor:
    """Write the samples of one step count as they are made, to steps-N/*.png and samples-N.npz.

    A folder of an earlier call is replaced, so that it never holds a mix; of two calls at a time the last one's files
    stay. Points have no pictures. Memory does not grow with the number of samples. The ``record`` of samples that a
    model did not make alone, complete once they are made, is written as JSON into the archive. Returns the first
    samples, as many as a grid shows.
    """
    shown: list[Tensor] = []
    labels: list[Tensor] = []
    pictures: list[Future[None]] = []
    done = 0
    made = iter(batches)
    first = next(made)
    has_pictures = first[0].ndim == 4
    out.mkdir(parents=True, exist_ok=True)
    with (
        lock_later(out) as lock,
        new_directory(out / f"steps-{count}", PICTURES) if has_pictures else nullcontext(out) as folder,
        new_file(out / f"samples-{count}.npz") as archive,
        tempfile.TemporaryFile(dir=out) as rows,
        ThreadPoolExecutor() as pool,
    ):
        for x, label in chain([first], made):
            if not bool(torch.isfinite(x).all()):
                raise UserError(
                    f"the model's samples in {counted(count, 'step')} hold NaN or infinity: nothing is written"
                )
            x = x.cpu()
            if done < (COLUMNS if has_pictures else GRID):
                shown.append(x)
            for picture in pictures:  # of the batch before, so that no more than two are in memory
                picture.result()
            if has_pictures:
                x = to_uint8(x)
                pictures = [pool.submit(_save, image, folder / f"{done + i:06d}.png") for i, image in enumerate(x)]
                x = x.movedim(1, -1).contiguous()
            done += len(x)
            _append(rows, x.numpy(), done)
            labels += [] if label is None else [label.cpu()]
        for picture in pictures:
            picture.result()
        with zipfile.ZipFile(archive, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as target:  # the name that ADM's evaluator reads
                rows.seek(0)
                shutil.copyfileobj(rows, target)
            arrays = {"label": torch.cat(labels).numpy()} if labels else {}
            arrays |= {} if record is None else {RECORD: np.array(json.dumps(finite(record)))}
            for name, array in {**arrays, WRITTEN_BY: np.array(WRITER)}.items():
                with file.open(f"{name}.npy", "w") as target:
                    np.lib.format.write_array(target, array)
        lock()  # so that pictures and archive are of one call
    return torch.cat(shown)


def _save(image: Tensor, path: Path) -> None:
    path.write_bytes(png(to_pil(image)))


def _append(file: IO[bytes], batch: Any, total: int) -> None:
    """Append an array to an .npy file that then has ``total`` rows; numpy leaves room in the header for the number."""
    facts = np.lib.format.header_data_from_array_1_0(batch)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {**facts, "shape": (total, *batch.shape[1:])})
    file.seek(0, os.SEEK_END)
    file.write(batch.tobytes())


def sample_batches(
    fm: FlowMap,
    times: Tensor,
    items: range,
    seed: int,
    *,
    progress: bool = False,
    sampler: str | None = None,
    **options: Any,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the samples ``items`` of ``seed``, latents decoded, and their labels, batch by batch.

    ``options`` are those of ``flowmaps.generate.generate``; ``progress`` shows a bar on a terminal.
    """
    sampler = sampler or fm.info.sampler
    made = generate(fm, times, len(items), seed, sampler=sampler, first=items.start, **options)
    title, hidden = f"{sampler}, {counted(len(times) - 1, 'step')}", None if progress else True
    with tqdm(total=len(items), desc=title, unit="sample", disable=hidden, leave=False) as bar:
        for x, label in made:
            bar.update(len(x))
            yield fm.decode(x), label


def samples(fm: FlowMap, steps: int, n: int, seed: int) -> Tensor:
    """Return ``n`` samples (images, of latents too) in uniform steps, as the model is sampled if nothing is said."""
    made = sample_batches(fm, uniform_times(steps), range(n), seed, **fm.info.usual_guidance())
    return torch.cat([x for x, _ in made])


def real_samples(fm: FlowMap, data: DataSet, n: int, seed: int) -> Tensor:
    """Return ``n`` of ``data``, drawn by ``seed``, as ``fm`` sees them: cropped, resized, latents through the VAE."""
    items, noise = ShuffledOrder(len(data), seed).indices(0, n), generator(seed, "latents", 0)
    x = as_samples(data, data.fetch(items)[0], lambda shape: torch.randn(shape, generator=noise))
    return fm.decode(x.to(next(fm.parameters()).device)).cpu()


def grid_image(
    fm: FlowMap, steps: Sequence[int], seed: int, columns: int = 16, data: DataSet | None = None
) -> Image.Image:
    """Draw the same noise carried to data in different step counts, one row per count, below a row of ``data``."""
    n = columns if len(fm.info.shape) == 3 else GRID  # points are drawn as a density
    n = min(n, 8) if fm.info.latent_scale else n  # large images
    rows = [] if data is None else [real_samples(fm, data, n, seed)]
    return to_pil(sample_grid([*rows, *(samples(fm, count, n, seed) for count in steps)]))
