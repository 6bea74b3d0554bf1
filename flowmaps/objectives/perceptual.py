"""Perceptual terms: distances of features between the image that a velocity predicts and the data."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.metrics.convnext import CHECKPOINT, convnext
from flowmaps.metrics.lpips import lpips
from flowmaps.objectives.base import Draws, Objective, Segments, new_option
from samplers.callables import expand

SIZE = 224  # pixels that the feature networks see


@dataclass
class PerceptualTerms(Objective):
    """Options for perceptual terms in a row's loss, for objectives that regress a velocity of images.

    With the prediction y = I_s + (1 - s) v_{s,t}(I_s) a row with s > ``perceptual_after`` adds

        lpips P / (sg[P] + c)^p + convnext Q / (sg[Q] + c)^p

    to its loss, with p = ``adaptive`` and c = ``adaptive_floor``. P is LPIPS and Q the squared distance of
    ConvNeXt V2's features, between y and x1 after the same random crop. Pixel MeanFlow (arXiv 2601.22158).
    """

    lpips: float = new_option(0.0, before=0.0)  # weight of LPIPS; 0: without
    lpips_weights: str = new_option("", before="")  # folder of its files; empty: torch.hub's download folder
    convnext: float = new_option(0.0, before=0.0)  # weight of ConvNeXt V2's features; 0: without
    convnext_weights: str = new_option("", before="")  # a directory or hub id of that network
    perceptual_after: float = new_option(0.2, before=0.2)  # rows with s up to this have neither term

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lpips", "convnext"):
            weight, files = getattr(self, name), f"{name}_weights"
            if not weight >= 0:
                raise UserError("must not be negative", field=name, value=weight)
            if getattr(self, files) and not weight:
                raise UserError(f"has no effect without {name} above 0", field=files, value=getattr(self, files))
        if self.convnext and not self.convnext_weights:
            reason = f"needs convnext_weights, a directory or hub id such as {CHECKPOINT}"
            raise UserError(reason, field="convnext", value=self.convnext)
        if not 0 <= self.perceptual_after < 1:
            raise UserError("must be in [0, 1)", field="perceptual_after", value=self.perceptual_after)

    @property
    def perceptual(self) -> dict[str, float]:
        """The weight of each term, by name."""
        return {name: getattr(self, name) for name in ("lpips", "convnext") if getattr(self, name)}

    def idle(self) -> set[str]:
        return super().idle() | (set() if self.perceptual else {"perceptual_after"})

    def check_samples(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().check_samples(shape, device)
        for name in self.perceptual:
            if len(shape) != 3 or shape[0] not in (1, 3):
                reason = f"compares images of 1 or 3 channels, but samples have the shape {shape}: leave it at 0"
                raise UserError(reason, field=name, value=getattr(self, name))
        if self.perceptual:
            image = torch.zeros(1, *shape, device=device)
            self.distances(image, image, whole(image))

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        draws = super().draw(fm, x1, generator, step)
        if not self.perceptual:
            return draws
        uniform = torch.rand(4, len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
        return draws._replace(crop=crops(uniform, *x1.shape[2:]))

    def perceptual_losses(
        self, fm: FlowMap, x1: Tensor, draws: Draws, velocity: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """Return the distances of the terms that are on, unweighted: [terms, B], 0 where s is too small."""
        if fm.interpolant_name != "linear":
            name = next(iter(self.perceptual))
            raise UserError("is for the linear path only", field=name, value=getattr(self, name))
        x_s = fm.interpolant.point(draws.x0, x1, draws.s)
        y = x_s + expand(1 - draws.s, x_s) * velocity
        y = torch.where(expand(draws.s > self.perceptual_after, y), y, x1)
        losses: Tensor = self.distances(y, x1, draws.crop)
        terms |= dict(zip(self.perceptual, losses.detach().mean(dim=1), strict=True))
        return losses

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def distances(self, y: Tensor, x1: Tensor, crop: Tensor) -> Tensor:
        """Return the distances [terms, n] between images [n, C, H, W], cut out by ``crop`` [n, 4] and resized.

        Runs eagerly in a compiled loss.
        """
        networks = {"lpips": lpips, "convnext": convnext}
        with torch.autocast(y.device.type, enabled=False):
            y, x1 = (resized(image, crop, SIZE) for image in (y, x1))
            found = [networks[name](getattr(self, f"{name}_weights"), y.device)(y, x1) for name in self.perceptual]
        return torch.stack(found)

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        if not self.perceptual:
            return super().adapted(losses, draws, dimensions)
        others, perceptual = losses.tensor_split([len(losses) - len(self.perceptual)])
        weighted = [weight * loss for weight, loss in zip(self.perceptual.values(), perceptual, strict=True)]
        scale = (perceptual.detach() + self.adaptive_floor).pow(-self.adaptive)
        return torch.cat([super().adapted(others, draws, dimensions), torch.stack(weighted) * scale])


def whole(image: Tensor) -> Tensor:
    """Return crops [n, 4] that leave the images [n, C, H, W] as they are."""
    return torch.tensor([0, 0, *image.shape[2:]], dtype=image.dtype, device=image.device).expand(len(image), 4)


def crops(uniform: Tensor, height: int, width: int) -> Tensor:
    """Return random crops (top, left, height, width) [n, 4] in pixels, integers, from uniform numbers [4, n].

    The area is uniform on [0.08, 1] of the image's, and the logarithm of the aspect, relative to the image's, on
    [ln 3/4, ln 4/3]. Sides longer than the image's are cut to it.
    """
    area, aspect = 0.08 + 0.92 * uniform[0], torch.exp((2 * uniform[1] - 1) * math.log(4 / 3))
    h = (height * (area / aspect).sqrt()).round().clamp(1, height)
    w = (width * (area * aspect).sqrt()).round().clamp(1, width)
    top, left = torch.floor(uniform[2] * (height - h + 1)), torch.floor(uniform[3] * (width - w + 1))
    return torch.stack([top.minimum(height - h), left.minimum(width - w), h, w], dim=1)


def resized(image: Tensor, crop: Tensor, size: int) -> Tensor:
    """Cut each image [n, C, H, W] to its ``crop`` [n, 4] and resize to ``size``: cubic, with antialiasing.

    As torchvision's resized_crop of one image, but for all at once, and with a gradient that is deterministic on CUDA.
    """
    top, left, height, width = crop.to(image.dtype).T
    rows, columns = cubic(top, height, image.shape[2], size), cubic(left, width, image.shape[3], size)
    return torch.einsum("nih,nchw,njw->ncij", rows, image, columns)


def cubic(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return the matrices [n, size, pixels] that resize the segments from ``start`` [n], ``length`` [n] long.

    Keys' cubic kernel with a = -1/2, as wide as the pixels of the coarser of the two grids.
    """
    places: Any = {"device": start.device, "dtype": start.dtype}
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    pixel = torch.arange(pixels, **places) + 0.5
    centre = start + (torch.arange(size, **places)[:, None] + 0.5) * scale
    d = ((pixel - centre) / scale.clamp(min=1)).abs()
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2
    weights: Tensor = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)
