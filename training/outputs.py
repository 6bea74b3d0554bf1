"""Writing samples to a directory."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flowmaps.files import write_file
from flowmaps.images import sample_grid, to_pil, to_uint8


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def write_samples(results: dict[int, list[tuple[Tensor, Tensor | None]]], out: Path) -> None:
    """Write the (samples, labels) batches of each step count: steps-N/*.png, samples-N.npz and grid.png."""
    rows = []
    for count, batches in results.items():
        x = torch.cat([x for x, _ in batches]).cpu()
        labels = [label for _, label in batches if label is not None]
        arrays: dict[str, Any] = {"label": torch.cat(labels).cpu().numpy()} if labels else {}
        if x.ndim == 4:
            images = to_uint8(x)
            arrays["samples"] = rearrange(images, "n c h w -> n h w c").numpy()
            folder = out / f"steps-{count}"
            folder.mkdir(exist_ok=True)
            for i, image in enumerate(images):
                to_pil(image).save(folder / f"{i:06d}.png")
        else:
            arrays["samples"] = x.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_file(out / f"samples-{count}.npz", buffer.getvalue())
        rows.append(x)
    to_pil(sample_grid(rows)).save(out / "grid.png")
