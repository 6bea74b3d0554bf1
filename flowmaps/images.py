"""Conversion between images and numbers, and grids of images; all other code uses these functions."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from flowmaps.files import WRITER, write_file


def to_uint8(x: Tensor) -> Tensor:
    """Convert [-1, 1] to 0 .. 255, rounded and clipped as in EDM, so that FIDs are comparable."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Convert 0 .. 255 to [-1, 1] in float32; ``to_uint8`` is the exact inverse."""
    return x.float().div_(127.5).sub_(1)  # in one piece of memory: three to write take most of the time


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 image [C, H, W], C = 1 or 3, to a PIL image."""
    picture: Image.Image = to_pil_image(image)
    return picture


def points_to_image(x: Tensor, size: int = 96, extent: float = 1.25) -> Tensor:
    """Draw points [n, 2] as their density on [-extent, extent]^2: uint8 [1, size, size], white on black."""
    cell = ((x.float().cpu() + extent) / (2 * extent) * size).long()
    inside = ((cell >= 0) & (cell < size)).all(dim=1)
    index = (size - 1 - cell[inside, 1]) * size + cell[inside, 0]  # the second axis points up
    count = torch.bincount(index, minlength=size**2).view(1, size, size).float()
    return (255 * (count / count.max().clamp(min=1)).sqrt()).to(torch.uint8)


def grid(rows: Sequence[Tensor], scale: int = 1, gap: int = 2) -> Tensor:
    """Arrange uint8 images in a grid, one row per entry [n, C, H, W]: uint8 [C, height, width].

    Each pixel becomes ``scale`` x ``scale``, so that an 8x8 image is visible. Unlike in torchvision's ``make_grid``,
    rows may differ in length and grey images stay grey.
    """
    lines = []
    for row in rows:
        cells = row.cpu().repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
        lines.append(rearrange(F.pad(cells, (gap, gap, gap, gap), value=64), "n c h w -> c h (n w)"))
    width = max(line.shape[-1] for line in lines)
    return torch.cat([F.pad(line, (0, width - line.shape[-1]), value=64) for line in lines], dim=1)


def hstack(pictures: Sequence[Tensor], gap: int = 12) -> Tensor:
    """Place uint8 pictures [C, height, width] of equal height from left to right, with a white gap between them."""
    return torch.cat([pictures[0], *[F.pad(picture, (gap, 0), value=255) for picture in pictures[1:]]], dim=-1)


COLUMNS = 16  # images per row; a density of points uses all of them


def sample_grid(rows: Sequence[Tensor], columns: int = COLUMNS) -> Tensor:
    """Draw one row per entry: samples [n, C, H, W] in [-1, 1], or points [n, 2] as their density."""
    if rows[0].ndim == 2:
        return grid([points_to_image(row)[None] for row in rows])
    return grid([to_uint8(row[:columns]) for row in rows], scale=max(1, 48 // rows[0].shape[-1]))


def png(picture: Image.Image) -> bytes:
    """Return a picture as a PNG file that names flowmaps as its software."""
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("Software", WRITER)
    picture.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def write_png(picture: Image.Image, path: Path) -> None:
    """Write ``png`` atomically, in place of a picture that flowmaps wrote."""
    write_file(path, png(picture))
