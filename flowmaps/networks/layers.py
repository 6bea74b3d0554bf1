"""Layers shared by the networks, all safe under torch.func.jvp and torch.compile.

Affine ``nn.GroupNorm``/``nn.LayerNorm`` stop torch.compile inside a jvp, and under autocast they hand a float32
tangent to the next half-precision layer. So: normalise without weights, then scale and shift by hand in x's type.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@contextmanager
def no_dropout(network: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, whatever the mode of ``network``."""
    active = [m for m in network.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


class Dropout(nn.Dropout):
    """Dropout that can use one mask for two passes of the network, see ``shared_dropout``."""

    shared = False
    mask: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.shared and self.training):
            return super().forward(input)
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(input), self.p)
        return input * self.mask


@contextmanager
def shared_dropout(network: nn.Module) -> Iterator[None]:
    """All passes of ``network`` inside the block, on batches of one shape, drop the same activations."""
    layers = [m for m in network.modules() if isinstance(m, Dropout)]
    for layer in layers:
        layer.shared = True
    try:
        yield
    finally:
        for layer in layers:
            layer.shared, layer.mask = False, None


def zero(layer: nn.Module) -> nn.Module:
    """Set the weights of ``layer`` to zero, so that its branch starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class TimeFeatures(nn.Module):
    """cos and sin of a time in [0, 1] at ``channels / 2`` geometrically spaced frequencies, 1 to 32: [B, channels].

    The bandwidth is modest on purpose. With times scaled to 0 .. 1000, as diffusion models have it, the tangent of
    the embedding is some hundred times its value and drowns the derivative of everything else.
    """

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        frequencies = torch.logspace(0, math.log2(32), channels // 2, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def soft_label(label: Tensor | None, augmentation: Tensor, num_classes: int) -> Tensor:
    """Label int64 [B] and augmentation parameters [B, n] as float rows that a network takes for its label.

    One-hot over 0 .. ``num_classes`` (the last means "no label"), if there are classes, then the parameters.
    """
    if not num_classes:
        return augmentation
    label = torch.full((len(augmentation),), num_classes, device=augmentation.device) if label is None else label
    return torch.cat([F.one_hot(label, num_classes + 1).to(augmentation.dtype), augmentation], dim=1)


def with_guidance(label: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """``label``, int64 [B] or rows of ``soft_label``, and guidance weights [B] as rows that a network takes for it."""
    rows = label if label.is_floating_point() else F.one_hot(label, num_classes + 1).to(weight.dtype)
    return torch.cat([rows, weight[:, None].to(rows.dtype)], dim=1)


def without_label(label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """``label`` with every class replaced by "no label", augmentation kept; and which rows had a class, bool [B]."""
    if not label.is_floating_point():
        return torch.full_like(label, num_classes), label != num_classes
    classes = torch.zeros_like(label[:, : num_classes + 1])
    classes[:, num_classes] = 1
    return torch.cat([classes, label[:, num_classes + 1 :]], dim=1), label[:, num_classes] == 0


class TimeEmbedding(nn.Module):
    """Embeds (s, t, label) as one vector [B, channels]: MLP(s) + MLP(t - s) + class, augmentation and guidance vectors.

    ``label`` is int64 [B], None, or float rows: those of ``soft_label`` where images were augmented, and of
    ``with_guidance`` where a guidance weight w was drawn. What is not given has its neutral value: no label, no
    augmentation (a zero vector), w = 1. w >= 1 enters as the time features of 1 / w.

    The last layers of the MLPs for t - s and 1 / w start at zero: a network trained with one time, loaded into this
    one, is the same function at s = t.
    """

    def __init__(self, channels: int, num_classes: int = 0, augment_dim: int = 0, guidance: bool = False) -> None:
        super().__init__()
        if guidance and not num_classes:
            raise ValueError("guidance needs classes: num_classes is 0")
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.features = TimeFeatures(channels)
        self.start = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.gap = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), zero(nn.Linear(channels, channels)))
        self.label = nn.Embedding(num_classes + 1, channels) if num_classes else None
        self.augmentation = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.guidance: nn.Module | None = None
        if guidance:
            last = zero(nn.Linear(channels, channels))
            self.guidance = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), last)

    def forward(self, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        dtype = cast(nn.Linear, self.start[0]).weight.dtype  # times keep their own precision until here
        embedding: Tensor = self.start(self.features(s).to(dtype)) + self.gap(self.features(t - s).to(dtype))
        weight = torch.ones_like(s)
        if label is not None and label.is_floating_point():
            classes, augmentation, guidance = self.columns(label)
            if self.label is not None:
                embedding = embedding + classes.to(dtype) @ self.label.weight
            if self.augmentation is not None:
                embedding = embedding + self.augmentation(augmentation.to(dtype))
            weight = guidance[:, 0].to(s.dtype) if guidance.shape[1] else weight
        elif self.label is not None:
            label = torch.full((len(s),), self.num_classes, device=s.device) if label is None else label
            embedding = embedding + self.label(label)
        elif label is not None:
            raise ValueError("this network is unconditional (num_classes=0): label must be None")
        if self.guidance is not None:
            embedding = embedding + self.guidance(self.features(1 / weight).to(dtype))
        return embedding

    def columns(self, rows: Tensor) -> list[Tensor]:
        """One-hot classes, augmentation parameters and guidance weight (0 or 1 column) of float label rows."""
        sizes = [self.num_classes + 1 if self.num_classes else 0, self.augment_dim]
        sizes.append(rows.shape[1] - sum(sizes))
        if sizes[-1] not in ((0, 1) if self.guidance is not None else (0,)):
            raise ValueError(
                f"label rows have {rows.shape[1]} columns, which is not what this network takes (num_classes="
                f"{self.num_classes}, augment_dim={self.augment_dim}, guidance={self.guidance is not None})"
            )
        return list(torch.split(rows, sizes, dim=1))


def normalise(x: Tensor) -> Tensor:
    """Group normalisation of [B, C, H, W] without weights: up to 32 groups of at least 4 channels, if C divides so."""
    channels = x.shape[1]
    most = max(1, min(32, channels // 4))
    return F.group_norm(x, next(groups for groups in range(most, 0, -1) if channels % groups == 0))


def layer_norm(x: Tensor) -> Tensor:
    """Layer normalisation of [B, n, C] along C without weights.

    As one group of a group normalisation: backward through the forward derivative of F.layer_norm is wrong, silently
    (pytorch issue 196700; seen in 2.11 and 2.15).
    """
    return F.group_norm(x.flatten(0, 1), 1, eps=1e-6).view_as(x)


class GroupNorm(nn.Module):
    """Group normalisation whose scale and shift are applied by hand, in the type of the activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.weight.to(x.dtype)[:, None, None], self.bias.to(x.dtype)[:, None, None]
        return torch.addcmul(shift, normalise(x), scale)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of [B, C, H, W], added to its input; starts as the identity."""

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        if channels % min(channels, head_channels):
            raise ValueError(f"attention needs channels ({channels}) divisible by head_channels ({head_channels})")
        self.heads = max(1, channels // head_channels)
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(rearrange(y, "b heads (h w) c -> b (heads c) h w", h=h, w=w))
        return x + out
