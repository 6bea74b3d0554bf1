"""A condition in place of a class: a vector, tokens, or an image, as rows and inside a network."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmaps.errors import shorten

MOST_NUMBERS = 2**24  # of a condition


def label_size(num_classes: int, shape: tuple[int, ...]) -> int:
    """Return the ``size`` of labels: how many classes there are, or numbers in a condition of ``shape``."""
    return num_classes or (math.prod(shape) if shape else 0)


def condition_rows(label: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return a condition [B, *shape] as rows [B, size + 1], the last column 0; any other ``label`` as it is."""
    if label is None or not shape or tuple(label.shape[1:]) != tuple(shape):
        return label
    return F.pad(label.flatten(1), (0, 1))


def given_rows(label: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the rows [B, size + 1] of a condition, which a label in form of rows begins with."""
    size = math.prod(shape)
    return F.pad(like.new_zeros(like.shape[0], size), (0, 1), value=1.0) if label is None else label[:, : size + 1]


def check_condition(config: Mapping[str, Any], tokens: bool = False) -> None:
    """Refuse a ``condition`` that is not the shape of a vector, an image or, with ``tokens``, of tokens."""
    shape, side = tuple(config["condition"]), config["image_size"]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    kinds = "(dim,), (channels, image_size, image_size)" + " or (tokens, dim)" * tokens
    fits = len(shape) == 1 or (len(shape) == 2 and tokens) or (len(shape) == 3 and shape[1:] == (side, side))
    if shape and not (whole and fits and math.prod(shape) <= MOST_NUMBERS):
        raise ValueError(f"condition={shorten(shape, 60)}: must be {kinds}, of at most {MOST_NUMBERS:,} numbers")
    if shape and config["num_classes"]:
        raise ValueError("a network has classes or a condition: set num_classes=0 or condition=()")


class ConditionEmbedding(nn.Module):
    """Embeds rows of a condition of shape [dim] or [n, dim]: [B, channels] or [B, n, channels].

    An MLP of each vector; rows without a condition have a learned value in its place, which starts at zero.
    """

    def __init__(self, shape: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.mlp = nn.Sequential(nn.Linear(shape[-1], channels), nn.SiLU(), nn.Linear(channels, channels))
        self.nothing = nn.Parameter(torch.zeros(*shape[:-1], channels))

    def forward(self, rows: Tensor) -> Tensor:
        dtype = cast(nn.Linear, self.mlp[0]).weight.dtype
        made: Tensor = self.mlp(rows[:, :-1].to(dtype).reshape(-1, *self.shape))
        absent = (rows[:, -1] > 0)[(slice(None), *[None] * len(self.shape))]
        return torch.where(absent, self.nothing.to(made.dtype), made)


class Conditioned:
    """The part of a network that takes a condition: its shape, and an image concatenated to x."""

    data_std: float
    condition: tuple[int, ...] = ()  # its shape
    images = 0  # channels of a condition that is an image

    def conditioned(self, config: Mapping[str, Any], tokens: bool = False) -> None:
        """Set the shape of the condition, in a network's constructor."""
        check_condition(config, tokens)
        self.condition = tuple(config["condition"])
        self.images = self.condition[0] if len(self.condition) == 3 else 0

    def with_image(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Return x with the channels of the condition's image, divided by ``data_std``, if it is one; else x.

        The image of rows without a condition is zero.
        """
        if not self.images:
            return x
        if label is None:
            image = x.new_zeros(x.shape[0], *self.condition)
        else:
            image = label[:, : math.prod(self.condition)].reshape(-1, *self.condition).to(x.dtype)
        return torch.cat([x, image / self.data_std], dim=1)
