"""Build a flow map from weights under our names. Everything is checked before a weight is copied."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.flow_map import FlowMap
from flowmaps.importers.torch_files import Weights
from flowmaps.info import FlowMapInfo
from flowmaps.networks import NETWORKS

ZERO_AT_FIRST = ("embedding.gap.", "embedding.gains.")  # the second time, which no published drift has


@dataclass(frozen=True)
class Options:
    """Facts that weights do not show, as the user gives them (None: not given), and those that had to be assumed."""

    image_size: int | None = None
    heads: int | None = None
    prediction: str | None = None
    path: str | None = None
    guidance: float | None = None
    decoupled: int | None = None
    base_std: float | None = None
    assumed: dict[str, str] = field(default_factory=dict)

    def settle(self, name: str, found: Any, default: Any = None) -> Any:
        """Return what the file says of ``name``, or the user does, or else note ``default`` as assumed.

        Raises:
            UserError: File and user differ, or nobody says anything and there is no ``default``.
        """
        given = getattr(self, name)
        if None not in (given, found) and given != found:
            raise UserError(f"but the file says {shorten(found, 80)}: leave {name} out", name, given)
        value = given if found is None else found
        if value is None and default is None:
            raise UserError("is needed, since neither the weights nor their file show it", name)
        if value is None:
            self.assumed[name] = str(default)
        return default if value is None else value


@dataclass
class Source:
    """Content of a file: class and arguments of our network for it, its weights under our names, and facts."""

    network: str
    options: dict[str, Any]
    weights: Weights
    label_dropout: float = 0.0  # share of training rows without a label
    interpolant: str = "linear"
    latents: dict[str, Any] = field(default_factory=dict)  # fields of FlowMapInfo, if the network works on latents
    files: tuple[Path, ...] = ()  # of the weights, if they are in a folder
    kind: str = "drift"  # of FlowMapInfo
    facts: dict[str, Any] = field(default_factory=dict)  # other fields of FlowMapInfo
    origin: dict[str, str] = field(default_factory=dict)  # entries of FlowMapInfo.origin
    base_std: float | None = None  # of the noise, if the network's arguments do not have it
    left_out: tuple[str, ...] = ()  # names of what the file has and the import does not take


def build(source: Source) -> FlowMap:
    """Build the flow map, in eval mode. Wrong names and shapes are refused, the first one by name."""
    cls, options = NETWORKS[source.network], source.options
    with torch.device("meta"):
        expected = {name: tuple(w.shape) for name, w in cls(**options).state_dict().items()}
    wanted = {name for name in expected if source.kind == "map" or not name.startswith(ZERO_AT_FIRST)}
    if wrong := sorted(wanted ^ source.weights.keys()):
        raise UnpicklingError(f"its structure differs: {wrong[0]} is {'missing' if wrong[0] in wanted else 'new'}")
    for name in sorted(wanted):
        weight = source.weights[name]
        if tuple(weight.shape) != expected[name]:
            raise UnpicklingError(f"{name} is {tuple(weight.shape)}, expected {expected[name]}")
        if weight.layout != torch.strided or weight.is_meta or not weight.is_floating_point():
            raise UnpicklingError(f"{name} is not a plain tensor of floats")
        if not weight.float().isfinite().all():
            raise UnpicklingError(f"{name} has NaN or infinity")
    network = cls(**options)
    network.load_state_dict({**network.state_dict(), **{k: w.float() for k, w in source.weights.items()}})
    classes, base_std = options["num_classes"], options["base_std"] if source.base_std is None else source.base_std
    parametrisation = getattr(network, "parametrisation", None)  # that of every network with one time
    info = FlowMapInfo(
        shape=(options["channels"], options["image_size"], options["image_size"]),
        num_classes=classes,
        kind=source.kind,
        t_range=parametrisation.t_range(base_std) if parametrisation else (0.0, 1.0),
        label_dropout=source.label_dropout if classes else 0.0,
        **source.latents,
        **source.facts,
    )
    return FlowMap(network, source.interpolant, base_std, info).eval()


def side(tokens: int, name: str) -> int:
    """Return the side of a square of ``tokens``."""
    if math.isqrt(tokens) ** 2 != tokens:
        raise UnpicklingError(f"{name} has {tokens} places, which is not a square number")
    return math.isqrt(tokens)


def check_empty(left: Iterable[str]) -> None:
    """Refuse weights that no layer of ours took."""
    if names := sorted(left):
        raise UnpicklingError(f"its structure differs: {shorten(names[0], 80)} is new")


def layer(place: str, weights: Weights, prefix: str = "") -> Weights:
    """Take the weight and bias that ``weights`` has under ``prefix``; return them under our name ``place``."""
    return {f"{place}.{key}": weights.pop(f"{prefix}{key}") for key in ("weight", "bias")}


def layers(place: str, weights: Weights, names: dict[str, str]) -> Weights:
    """Take the layers of a block that exist, for ``names`` from our name to theirs."""
    found = {mine: theirs for mine, theirs in names.items() if f"{theirs}.weight" in weights}
    pairs = (layer(f"{place}.{mine}", weights, f"{theirs}.").items() for mine, theirs in found.items())
    return dict(itertools.chain(*pairs))


def attention_weights(place: str, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor) -> Weights:
    """Return the matrices of an attention layer as 1 x 1 convolutions."""
    made = {"qkv.weight": qkv[:, :, None, None], "qkv.bias": qkv_bias}
    made |= {"out.weight": out[:, :, None, None], "out.bias": out_bias}
    return {f"{place}.attention.{name}": tensor for name, tensor in made.items()}
