"""From weights under our names to a flow map: everything is checked before a weight is copied."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from flowmaps.flow_map import FlowMap
from flowmaps.info import FlowMapInfo
from flowmaps.networks import NETWORKS

ZERO_AT_FIRST = ("embedding.gap.", "embedding.gains.")  # the second time: no published network has one


@dataclass
class Source:
    """What a file holds: class and arguments of our network for it, its weights under our names, and facts."""

    network: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    label_dropout: float = 0.0  # share of training rows without a label
    notes: dict[str, str] | None = None
    latents: dict[str, Any] = field(default_factory=dict)  # what FlowMapInfo has of them, if the network works on those
    file: Path | None = None  # of the weights, if it is in a folder


def build(source: Source) -> FlowMap:
    """The flow map of kind "drift" in eval mode; wrong shapes are refused by name."""
    cls, options = NETWORKS[source.network], source.options
    with torch.device("meta"):
        expected = {name: tuple(w.shape) for name, w in cls(**options).state_dict().items()}
    wanted = {name for name in expected if not name.startswith(ZERO_AT_FIRST)}
    if wrong := sorted(wanted ^ source.weights.keys()):
        raise UnpicklingError(f"it is built otherwise: {wrong[0]} is {'missing' if wrong[0] in wanted else 'new'}")
    for name in sorted(wanted):
        found = tuple(source.weights[name].shape)
        if found != expected[name]:
            raise UnpicklingError(f"{name} is {found}, expected {expected[name]}")
    network = cls(**options)
    network.load_state_dict({**network.state_dict(), **{k: w.float() for k, w in source.weights.items()}})
    classes, base_std = options["num_classes"], options["base_std"]
    info = FlowMapInfo(
        shape=(options["channels"], options["image_size"], options["image_size"]),
        num_classes=classes,
        kind="drift",
        t_range=network.parametrisation.t_range(base_std),
        label_dropout=source.label_dropout if classes else 0.0,
        origin=source.notes or {},
        **source.latents,
    )
    return FlowMap(network, "linear", base_std, info).eval()


def side(tokens: int, name: str) -> int:
    """The side of a square of ``tokens``."""
    if math.isqrt(tokens) ** 2 != tokens:
        raise UnpicklingError(f"{name} has {tokens} places, which are no square")
    return math.isqrt(tokens)
