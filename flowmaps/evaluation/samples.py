"""Samples to look at: grids of pictures, and samples on disk."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import new_directory, write_file
from flowmaps.flow_map import FlowMap
from flowmaps.generate import generate
from flowmaps.images import sample_grid, to_pil, to_uint8
from samplers.grids import uniform_times

GRID = 8192  # samples that a grid may look at: a point cloud needs many


def write_samples(batches: Iterable[tuple[Tensor, Tensor | None]], out: Path, count: int) -> Tensor:
    """Write the samples of one step count as they are made, steps-N/*.png and samples-N.npz; returns some for the grid.

    A folder of an earlier call is replaced, so that it never holds a mix.
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
        (out / f"steps-{count}").rmdir()  # points have no pictures of their own
    arrays: dict[str, Any] = {"samples": made.movedim(1, -1).numpy() if made.ndim == 4 else made.numpy()}
    if labels:
        arrays["label"] = torch.cat(labels).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(out / f"samples-{count}.npz", buffer.getvalue())
    return torch.cat(shown)


def samples(fm: FlowMap, steps: int, n: int, seed: int, sampler: str | None = None) -> Tensor:
    """``n`` samples (images, of latents too) with ``steps`` uniform steps: by the map, if ``fm`` is of that kind."""
    made = generate(fm, uniform_times(steps), n, seed, sampler=sampler or fm.info.sampler)
    return torch.cat([fm.decode(x) for x, _ in made])


def grid_image(fm: FlowMap, steps: Sequence[int], seed: int, columns: int = 16) -> Image.Image:
    """A picture of the same noise carried to data in different step counts, one row each."""
    n = columns if len(fm.info.shape) == 3 else 8192  # points are drawn as a density
    n = min(n, 8) if fm.info.latent_scale else n  # large images
    return to_pil(sample_grid([samples(fm, count, n, seed) for count in steps]))
