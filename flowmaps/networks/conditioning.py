"""Conditioning of a network: two times, and a label that may carry augmentation parameters and guidance."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def soft_label(label: Tensor | None, augmentation: Tensor, num_classes: int) -> Tensor:
    """Combine label int64 [B] and augmentation parameters [B, n] to float rows that a network takes as its label.

    One-hot over 0 .. ``num_classes`` (the last means "no label"), if there are classes, then the parameters.
    """
    if not num_classes:
        return augmentation
    label = torch.full((augmentation.shape[0],), num_classes, device=augmentation.device) if label is None else label
    return torch.cat([F.one_hot(label, num_classes + 1).to(augmentation.dtype), augmentation], dim=1)


def with_guidance(label: Tensor, guidance: Tensor, num_classes: int) -> Tensor:
    """Append guidance to ``label``, int64 [B] or rows of ``soft_label``: rows for a network.

    ``guidance`` is weights w [B], or rows (w, low, high) [B, 3]: the weight is 1 at times outside [low, high].
    """
    rows = label if label.is_floating_point() else F.one_hot(label, num_classes + 1).to(guidance.dtype)
    return torch.cat([rows, guidance.reshape(guidance.shape[0], -1).to(rows.dtype)], dim=1)


def guidance_at(label: Tensor, t: Tensor) -> Tensor:
    """Replace the last columns (w, low, high) of ``label`` by the weight that they give at times t [B]."""
    w, low, high = label[:, -3:].unbind(dim=1)
    return torch.cat([label[:, :-3], torch.where((low <= t) & (t <= high), w, 1.0)[:, None]], dim=1)


def without_label(label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Replace every class by "no label", keeping augmentation; also return which rows had a class, bool [B]."""
    if not label.is_floating_point():
        return torch.full_like(label, num_classes), label != num_classes
    classes = torch.zeros_like(label[:, : num_classes + 1])
    classes[:, num_classes] = 1
    return torch.cat([classes, label[:, num_classes + 1 :]], dim=1), label[:, num_classes] == 0


class Condition(NamedTuple):
    """Parts of a label: one-hot classes [B, num_classes + 1], augmentation [B, augment_dim], and guidance, each [B]."""

    classes: Tensor
    augmentation: Tensor
    guidance: Tensor  # its weight, between the times
    low: Tensor  # and
    high: Tensor


def condition(
    label: Tensor | None,
    like: Tensor,
    num_classes: int,
    augment_dim: int = 0,
    guidance: bool = False,
    interval: bool = False,
) -> Condition:
    """Split ``label`` into its parts, floats of the type of ``like`` [B]; absent parts have their neutral value.

    ``label`` is int64 [B], None, or float rows from ``soft_label`` (augmented images) or ``with_guidance`` (drawn
    guidance weights, and with ``interval`` their times). Neutral values are "no label", no augmentation (zeros), and
    weight 1 from time 0 to 1. Without classes or augmentation the corresponding part has no columns.
    """
    batch, sizes = like.shape[0], [num_classes + 1 if num_classes else 0, augment_dim]
    neutral = [torch.ones_like(like), torch.zeros_like(like), torch.ones_like(like)]
    if label is not None and label.is_floating_point():
        sizes.append(label.shape[1] - sum(sizes))
        if sizes[-1] not in (0, *[1] * guidance, *[3] * interval):
            raise ValueError(
                f"label rows have {label.shape[1]} columns, which does not fit this network (num_classes="
                f"{num_classes}, augment_dim={augment_dim}, guidance={guidance}, guidance_interval={interval})"
            )
        classes, augmentation, given = torch.split(label.to(like.dtype), sizes, dim=1)
        return Condition(classes, augmentation, *given.unbind(dim=1), *neutral[sizes[-1] :])
    if num_classes:
        label = torch.full((batch,), num_classes, device=like.device) if label is None else label
        # Not F.one_hot, which torch 2.11 cannot compile inside a forward derivative.
        classes = (label[:, None] == torch.arange(num_classes + 1, device=label.device)).to(like.dtype)
    elif label is not None:
        raise ValueError("this network is unconditional (num_classes=0): label must be None")
    else:
        classes = like.new_zeros(batch, 0)
    return Condition(classes, like.new_zeros(batch, augment_dim), *neutral)


def check_guidance(num_classes: int, guidance: bool, interval: bool) -> None:
    """Refuse to condition a network on guidance without classes, or on its times without its weight."""
    if guidance and not num_classes:
        raise ValueError("guidance needs classes: num_classes is 0")
    if interval and not guidance:
        raise ValueError("guidance_interval needs guidance=True")


class TimeEmbedding(nn.Module):
    """Embeds (s, t, label) as one vector [B, channels]: MLP(level) + MLP(t - s) + class and guidance vectors.

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
        augment_dim: int = 0,
        guidance: bool = False,
        interval: bool = False,
        label_first: bool = False,
        last: float = 32.0,
        fourier: bool = False,
        gap: str = "narrow",
    ) -> None:
        super().__init__()
        check_guidance(num_classes, guidance, interval)
        self.num_classes, self.augment_dim, self.label_first = num_classes, augment_dim, label_first
        self.channels, self.last = features, last
        self.frequencies: Tensor | None
        self.register_buffer("frequencies", geometric(features, last) if fourier else None)
        self.start = nn.Sequential(nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.gap_last = last if gap == "wide" else 32.0
        hidden = channels if gap == "wide" else features
        self.gap = None if gap == "none" else self.second(features, channels, hidden)
        self.label = nn.Embedding(num_classes + 1, features if label_first else channels) if num_classes else None
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
        given = condition(label, s, self.num_classes, self.augment_dim, guided, interval)
        dtype = cast(nn.Linear, self.start[0]).weight.dtype  # times keep their own precision until here
        start = time_features(level, self.channels, self.last, self.frequencies).to(dtype)
        classes = None if self.label is None else given.classes.to(dtype) @ self.label.weight
        if self.augmentation is not None:
            start = start + self.augmentation(given.augmentation.to(dtype))
        if classes is not None and self.label_first:
            start = start + classes
        embedding: Tensor = self.start(start)
        if self.gap is not None:
            embedding = embedding + self.gap(time_features(t - s, self.channels, self.gap_last).to(dtype))
        if classes is not None and not self.label_first:
            embedding = embedding + classes
        told = ((self.guidance, 1 / given.guidance), (self.low, given.low), (self.high, 1 - given.high))
        for mlp, value in told:
            if mlp is not None:
                embedding = embedding + mlp(time_features(value, self.channels).to(dtype))
        return embedding
