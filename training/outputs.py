"""Writing samples to a directory."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import new_directory, write_file
from flowmaps.images import to_pil, to_uint8

GRID = 8192  # samples that a grid may look at: a point cloud needs many


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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
