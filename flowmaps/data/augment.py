"""Augmentations of a batch of images and omissions of its labels, drawn from a given generator."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARAMETERS = 9  # numbers per image that describe its augmentation


def random_hflip(x: Tensor, label: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Mirror each image of [B, C, H, W] left to right with probability 1/2, and its label if that is an image too."""
    chosen = torch.rand(len(x), device=x.device, generator=generator) < 0.5
    if label is not None and label.ndim == 4:
        label = _flipped(label, chosen, -1)
    return _flipped(x, chosen, -1), label


def drop_labels(label: Tensor, nothing: Tensor, share: float, first: int, generator: torch.Generator) -> Tensor:
    """Replace labels [B, ...] by ``nothing``, which means "no label", a share of all rows in expectation.

    Rows are chosen among the ``first`` ones, with equal chance and independently.
    """
    drawn = torch.rand(len(label), device=label.device, generator=generator)
    chosen = drawn * max(first, 1) < share * len(label)
    chosen[first:] = False
    return torch.where(chosen.view(-1, *[1] * (label.ndim - 1)), nothing, label)


def edm_augment(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Apply EDM's geometric augmentation to square images [B, C, H, W] in [-1, 1].

    Karras et al. 2022 (arXiv 2206.00364), appendix F.2, the set used for CIFAR-10: mirror left to right (half of all
    images), and each with ``probability``: upside down, scale, rotation, stretch along a random axis, shift.

    Returns the images, and parameters [B, 9], zero for an untouched image. The network is conditioned on them, so that
    samples drawn with zeros show no augmentation. Flips alone keep the pixels exactly; everything else is resampled
    bicubically.
    """
    n, device = len(x), x.device

    def uniform() -> Tensor:
        return torch.rand(n, device=device, generator=generator)

    def normal() -> Tensor:
        return torch.randn(n, device=device, generator=generator)

    def sometimes(values: Tensor) -> Tensor:
        return torch.where(uniform() < probability, values, 0.0)

    def angle() -> Tensor:
        return math.pi * (2 * uniform() - 1)

    left_right = (uniform() < 0.5).float()
    upside_down = sometimes((uniform() < 0.5).float())
    scale, turn, stretch = sometimes(normal()), sometimes(angle()), sometimes(normal())
    axis = torch.where(uniform() < 0.5, angle(), 0.0)
    right, down = normal(), normal()
    shifted = uniform() < probability
    right, down = torch.where(shifted, right, 0.0), torch.where(shifted, down, 0.0)
    along = [stretch * axis.cos(), stretch * axis.sin()]
    parameters = torch.stack([left_right, upside_down, scale, turn.cos() - 1, turn.sin(), *along, right, down], dim=1)
    x = _flipped(_flipped(x, left_right > 0, -1), upside_down > 0, -2)
    growth, strain = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    # Scale and turn first, then stretch, then shift. The angles of turn and axis are counter-clockwise, but rows count
    # downwards, hence the signs.
    linear = _rotation(-axis) @ torch.diag_embed(torch.stack([strain, 1 / strain], dim=1)) @ _rotation(axis)
    linear = linear @ _rotation(-turn) * growth[:, None, None]
    shift = 2 * 0.125 * torch.stack([right, down], dim=1)  # an eighth of the image's width, which is 2
    return _moved(x, linear, shift, parameters[:, 2:].any(dim=1)), parameters


def _flipped(x: Tensor, chosen: Tensor, dim: int) -> Tensor:
    return torch.where(chosen[:, None, None, None], x.flip(dim), x)


def _rotation(angle: Tensor) -> Tensor:
    """Return matrices [B, 2, 2] for points (right, down): clockwise on the screen by ``angle``."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _moved(x: Tensor, linear: Tensor, shift: Tensor, chosen: Tensor) -> Tensor:
    """Move each pixel of the ``chosen`` images from p to ``linear`` p + ``shift``; an image spans [-1, 1]^2."""
    back = torch.linalg.inv_ex(linear).inverse  # each new pixel looks up where it came from; linalg.inv would wait
    theta = torch.cat([back, -back @ shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    out = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)
    return torch.where(chosen[:, None, None, None], out, x)
