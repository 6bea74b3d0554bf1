"""Conditioning of a network: two times, and a label that may carry augmentation parameters and guidance.

A label is a class, int64 [B], or a condition: floats of the shape that the network's ``condition`` says. Both have a
form as float rows, of ``size`` numbers and one more that is 1 for "no label": one-hot classes (``size`` of them), or
the numbers of the condition. Augmentation parameters and guidance are further columns of such rows.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmaps.networks.conditions import ConditionEmbedding, label_size
from flowmaps.networks.layers import zero


def geometric(channels: int, last: float, like: Tensor | None = None) -> Tensor:
    """Return ``channels / 2`` geometrically spaced frequencies, 1 to ``last``, of the type of ``like``."""
    device, dtype = (None, torch.float32) if like is None else (like.device, like.dtype)
    count = channels // 2
    exponents: Tensor = torch.arange(count, device=device, dtype=dtype) / max(1, count - 1)
    return last**exponents


def time_features(t: Tensor, channels: int, last: float = 32.0, frequencies: Tensor | None = None) -> Tensor:
    """Return cos and sin of t [B] at ``frequencies``, or else ``geometric`` ones: [B, channels].

    For times in [0, 1], 32 is modest on purpose. With times scaled to 0 .. 1000, as diffusion models have it, the
    tangent of the embedding is some hundred times its value and drowns the derivative of everything else.
    """
    phase = t[:, None] * (geometric(channels, last, t) if frequencies is None else frequencies.to(t.dtype))
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def soft_label(label: Tensor | None, augmentation: Tensor, size: int) -> Tensor:
    """Combine a label, int64 [B] or rows, and augmentation parameters [B, n] to rows that a network takes.

    Without classes or a condition these are the parameters alone. A ``label`` of None is "no label".
    """
    if not size:
        return augmentation
    label = torch.full((augmentation.shape[0],), size, device=augmentation.device) if label is None else label
    return torch.cat([_rows(label, size, augmentation.dtype), augmentation], dim=1)


def with_guidance(label: Tensor, guidance: Tensor, size: int) -> Tensor:
    """Append guidance to ``label``, int64 [B] or rows: rows for a network.

    ``guidance`` is weights w [B], or rows (w, low, high) [B, 3]: the weight is 1 at times outside [low, high].
    """
    rows = _rows(label, size, guidance.dtype)
    return torch.cat([rows, guidance.reshape(guidance.shape[0], -1).to(rows.dtype)], dim=1)


def _rows(label: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return label if label.is_floating_point() else F.one_hot(label, size + 1).to(dtype)


def guidance_at(label: Tensor, t: Tensor) -> Tensor:
    """Replace the last columns (w, low, high) of ``label`` by the weight that they give at times t [B]."""
    w, low, high = label[:, -3:].unbind(dim=1)
    return torch.cat([label[:, :-3], torch.where((low <= t) & (t <= high), w, 1.0)[:, None]], dim=1)


def without_label(label: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Replace every label by "no label", keeping augmentation; also return which rows had one, bool [B]."""
    if not label.is_floating_point():
        return torch.full_like(label, size), label != size
    nothing = torch.zeros_like(label[:, : size + 1])
    nothing[:, size] = 1
    return torch.cat([nothing, label[:, size + 1 :]], dim=1), label[:, size] == 0


class LabelParts(NamedTuple):
    """Parts of a label: its rows [B, size + 1], augmentation [B, augment_dim], and guidance, each [B]."""

    rows: Tensor
    augmentation: Tensor
    guidance: Tensor  # its weight, between the times
    low: Tensor  # and
    high: Tensor


def split_label(
    label: Tensor | None,
    like: Tensor,
    size: int,
    augment_dim: int = 0,
    guidance: bool = False,
    interval: bool = False,
) -> LabelParts:
    """Split ``label`` into its parts, floats of the type of ``like`` [B]; absent parts have their neutral value.

    ``label`` is int64 [B], None, or rows from ``condition_rows``, ``soft_label`` (augmented images) or
    ``with_guidance`` (drawn guidance weights, and with ``interval`` their times). Neutral values are "no label", no
    augmentation (zeros), and weight 1 from time 0 to 1. Without labels or augmentation their parts have no columns.
    """
    batch, sizes = like.shape[0], [size + 1 if size else 0, augment_dim]
    neutral = [torch.ones_like(like), torch.zeros_like(like), torch.ones_like(like)]
    if label is not None and label.is_floating_point():
        sizes.append(label.shape[1] - sum(sizes))
        if sizes[-1] not in (0, *[1] * guidance, *[3] * interval):
            raise ValueError(
                f"label rows have {label.shape[1]} columns, which does not fit this network ({size} "
                f"numbers of a label, augment_dim={augment_dim}, guidance={guidance}, guidance_interval={interval})"
            )
        rows, augmentation, given = torch.split(label.to(like.dtype), sizes, dim=1)
        return LabelParts(rows, augmentation, *given.unbind(dim=1), *neutral[sizes[-1] :])
    if size:
        label = torch.full((batch,), size, device=like.device) if label is None else label
        # Not F.one_hot, which torch 2.11 cannot compile inside a forward derivative.
        rows = (label[:, None] == torch.arange(size + 1, device=label.device)).to(like.dtype)
    elif label is not None:
        raise ValueError("this network is unconditional (num_classes=0): label must be None")
    else:
        rows = like.new_zeros(batch, 0)
    return LabelParts(rows, like.new_zeros(batch, augment_dim), *neutral)


def check_guidance(size: int, guidance: bool, interval: bool) -> None:
    """Refuse to condition a network on guidance without labels, or on its times without its weight."""
    if guidance and not size:
        raise ValueError("guidance needs classes or a condition: num_classes is 0")
    if interval and not guidance:
        raise ValueError("guidance_interval needs guidance=True")


class TimeEmbedding(nn.Module):
    """Embeds (s, t, label) as one vector [B, channels]: MLP(level) + MLP(t - s) + class and guidance vectors.

    In place of a class there may be a ``condition`` that is a vector; one of another shape enters elsewhere.

    ``gap`` is the MLP for t - s: "narrow", which adds little to a published network with one time; "wide", with
    the sizes and frequencies of that of the level (SoFlow, MeanFlow SiT); or "none", where t is a level too (DMF).

    The MLPs see ``features`` time features; the highest frequency for the level (s, or a published network's noise
    level) is ``last``; with ``fourier`` the frequencies travel with the weights (NCSN++). Augmentation parameters are
    added to the level's features. So are class vectors if ``label_first`` (DDPM++); otherwise they are added to the
    MLP's output (ADM, DiT). A guidance weight w >= 1 enters as the features of 1 / w, and with ``interval`` its times
    as those of low and 1 - high. For ``label`` see ``condition``.

    The last layers of the MLPs for t - s and guidance start at zero: a network trained with one time, loaded into this
    one, is the same function at s = t.
    """

    def __init__(
        self,
        features: int,
        channels: int,
        num_classes: int = 0,
        condition: tuple[int, ...] = (),
        augment_dim: int = 0,
        guidance: bool = False,
        interval: bool = False,
        label_first: bool = False,
        last: float = 32.0,
        fourier: bool = False,
        gap: str = "narrow",
    ) -> None:
        super().__init__()
        self.size = label_size(num_classes, condition)
        check_guidance(self.size, guidance, interval)
        self.augment_dim, self.label_first = augment_dim, label_first
        self.channels, self.last = features, last
        self.frequencies: Tensor | None
        self.register_buffer("frequencies", geometric(features, last) if fourier else None)
        self.start = nn.Sequential(nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.gap_last = last if gap == "wide" else 32.0
        hidden = channels if gap == "wide" else features
        self.gap = None if gap == "none" else self.second(features, channels, hidden)
        to = features if label_first else channels
        self.label = nn.Embedding(num_classes + 1, to) if num_classes else None
        self.condition = ConditionEmbedding(condition, to) if len(condition) == 1 else None
        self.augmentation = nn.Linear(augment_dim, features, bias=False) if augment_dim else None
        self.guidance = self.second(features, channels) if guidance else None
        self.low = self.second(features, channels) if interval else None
        self.high = self.second(features, channels) if interval else None

    @staticmethod
    def second(features: int, channels: int, hidden: int = 0) -> nn.Sequential:
        """Return an MLP whose output starts at zero, with ``hidden`` numbers inside (0: as many as ``features``)."""
        hidden = hidden or features
        return nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), zero(nn.Linear(hidden, channels)))

    def forward(self, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        guided, interval = self.guidance is not None, self.low is not None
        given = split_label(label, s, self.size, self.augment_dim, guided, interval)
        dtype = cast(nn.Linear, self.start[0]).weight.dtype  # times keep their own precision until here
        start = time_features(level, self.channels, self.last, self.frequencies).to(dtype)
        told = None if self.label is None else given.rows.to(dtype) @ self.label.weight
        if self.condition is not None:
            told = self.condition(given.rows)
        if self.augmentation is not None:
            start = start + self.augmentation(given.augmentation.to(dtype))
        if told is not None and self.label_first:
            start = start + told
        embedding: Tensor = self.start(start)
        if self.gap is not None:
            embedding = embedding + self.gap(time_features(t - s, self.channels, self.gap_last).to(dtype))
        if told is not None and not self.label_first:
            embedding = embedding + told
        numbers = ((self.guidance, 1 / given.guidance), (self.low, given.low), (self.high, 1 - given.high))
        for mlp, value in numbers:
            if mlp is not None:
                embedding = embedding + mlp(time_features(value, self.channels).to(dtype))
        return embedding
