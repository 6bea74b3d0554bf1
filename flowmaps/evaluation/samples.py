"""Draw samples, show them as grids, write them to disk."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowmaps.errors import UserError
from flowmaps.files import new_directory, write_file
from flowmaps.flow_map import FlowMap
from flowmaps.generate import generate
from flowmaps.images import sample_grid, to_pil, to_uint8
from samplers.grids import uniform_times

GRID = 8192  # samples that a grid may need: a point cloud takes many


def write_samples(batches: Iterable[tuple[Tensor, Tensor | None]], out: Path, count: int) -> Tensor:
    """Write the samples of one step count as they are made, to steps-N/*.png and samples-N.npz.

    A folder of an earlier call is replaced, so that it never holds a mix. Returns the first samples, for a grid.
    """
    samples: list[Tensor] = []
    labels: list[Tensor] = []
    shown: list[Tensor] = []
    done = 0
    with new_directory(out / f"steps-{count}") as folder:
        for x, label in batches:
            if not bool(torch.isfinite(x).all()):
                raise UserError(f"the model's samples in {count} steps hold NaN or infinity: nothing is written")
            x = x.cpu()
            if done < GRID:
                shown.append(x)
            if x.ndim == 4:
                x = to_uint8(x)
                for i, image in enumerate(x):
                    to_pil(image).save(folder / f"{done + i:06d}.png")
            samples.append(x)
            done += len(x)
            labels += [] if label is None else [label.cpu()]
    made = torch.cat(samples)
    if made.ndim != 4:
        (out / f"steps-{count}").rmdir()  # points have no pictures
    arrays: dict[str, Any] = {"samples": made.movedim(1, -1).numpy() if made.ndim == 4 else made.numpy()}
    if labels:
        arrays["label"] = torch.cat(labels).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(out / f"samples-{count}.npz", buffer.getvalue())
    return torch.cat(shown)


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
    title, hidden = f"{sampler}, {len(times) - 1} steps", None if progress else True
    with tqdm(total=len(items), desc=title, unit="sample", disable=hidden, leave=False) as bar:
        for x, label in made:
            bar.update(len(x))
            yield fm.decode(x), label


def samples(fm: FlowMap, steps: int, n: int, seed: int) -> Tensor:
    """Return ``n`` samples (images, of latents too) in ``steps`` uniform steps of the model's own sampler."""
    return torch.cat([x for x, _ in sample_batches(fm, uniform_times(steps), range(n), seed)])


def grid_image(fm: FlowMap, steps: Sequence[int], seed: int, columns: int = 16) -> Image.Image:
    """Draw the same noise carried to data in different step counts, one row per count."""
    n = columns if len(fm.info.shape) == 3 else 8192  # points are drawn as a density
    n = min(n, 8) if fm.info.latent_scale else n  # large images
    return to_pil(sample_grid([samples(fm, count, n, seed) for count in steps]))
