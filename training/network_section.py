"""The section of a config that describes a network: its class and the arguments of the constructor."""
# No `from __future__ import annotations` here: ml_collections reads the annotations as types.

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec

from torch import nn

from flowmaps.errors import UserError, choose
from flowmaps.networks import NETWORKS, PRESETS
from flowmaps.objectives import ImprovedMeanFlow, Objective

P = ParamSpec("P")
FROM_DATA = ("channels", "num_classes", "attention_resolutions")  # arguments that may be None until the data are open


@dataclass
class NetworkSection:
    """A network class and the arguments of its constructor; ``network`` makes a subclass with these as fields."""

    network_class = nn.Module  # not annotated, so not a field

    def options(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    if TYPE_CHECKING:  # the fields exist at run time only

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    else:

        def __setattr__(self, name, value):
            names = [f.name for f in dataclasses.fields(self)]
            if name not in names:
                reason = f"{self.network_class.__name__} has no such option: {choose(name, names, every=False)}"
                raise UserError(reason, field=f"network.{name}")
            super().__setattr__(name, value)


def network(cls: Callable[P, nn.Module], *args: P.args, **options: P.kwargs) -> NetworkSection:
    """Describe a network in a config: ``network(UNet, image_size=32, width=64)``.

    Args:
        cls: A network of ``flowmaps.networks``, or your own (``flowmaps.networks.Network`` says what it must offer).
        args: Positional arguments of its constructor.
        options: Keyword arguments of its constructor. All remain fields, as in ``config.network.width = 32``.

    Raises:
        UserError: The constructor does not have one of the options, or an option without default is missing.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise UserError(f"must be a class of networks, such as {', '.join(NETWORKS)}", field="network", value=cls)
    made, names = _section_class(cls), inspect.signature(cls).parameters
    for name in options:
        if name not in names:
            reason = f"{cls.__name__} has no such option: {choose(name, names, every=False)}"
            raise UserError(reason, field=f"network.{name}")
    try:
        given = inspect.signature(cls).bind(*args, **options).arguments
    except TypeError as error:
        raise UserError(f"{made.network_class.__name__}: {error}", field="network") from None
    return made(**given)


def fitted(section: NetworkSection, shape: tuple[int, ...], num_classes: int) -> NetworkSection:
    """Return ``section`` with the arguments of ``FROM_DATA`` that are None chosen for samples of ``shape``.

    Channels and classes are those of the data. Attention is at the two lowest resolutions of a U-Net.
    """
    made: Any = copy.copy(section)
    for name in FROM_DATA:
        if getattr(made, name, 0) is not None:
            continue
        if name == "attention_resolutions":
            levels = [
                made.image_size // getattr(made, "patch", 1) // 2**level for level in range(len(made.channel_mult))
            ]
            value: Any = tuple(levels[1:][-2:])
        else:
            value = shape[0] if name == "channels" else num_classes
        setattr(made, name, value)
    return typing.cast(NetworkSection, made)


def check_fit(section: NetworkSection, objective: Objective) -> None:
    """Refuse a network that is not told what the objective tells it, or has a head that it does not train."""
    told = {"guidance": ("guidance_max", objective.guidance_max > 1)}
    told["guidance_interval"] = ("guidance_interval", objective.guidance_interval)
    for option, (name, given) in told.items():
        if getattr(section, option, False) != given:
            reason = f"needs network.{option}={given}: the network is conditioned on it, or not"
            raise UserError(reason, field=f"objective.{name}", value=getattr(objective, name))
    if isinstance(objective, ImprovedMeanFlow) and objective.perceptual and not getattr(section, "second_head", False):
        name = next(iter(objective.perceptual))
        raise UserError("needs network.second_head=True", field=f"objective.{name}", value=getattr(objective, name))
    if getattr(section, "second_head", False) and not isinstance(objective, ImprovedMeanFlow):
        raise UserError("only ImprovedMeanFlow trains it: set it to False", field="network.second_head", value=True)


def _section_class(cls: type[nn.Module]) -> type[NetworkSection]:
    hints = typing.get_type_hints(inspect.unwrap(cls.__init__))
    hints |= {name: hints[name] | None for name in FROM_DATA if name in hints}
    fields: list[Any] = [
        (p.name, hints.get(p.name, Any), field() if p.default is p.empty else field(default=p.default))
        for p in inspect.signature(cls).parameters.values()
    ]
    made: Any = dataclasses.make_dataclass(f"{cls.__name__}Section", fields, bases=(NetworkSection,), kw_only=True)
    made.network_class = cls
    return typing.cast(type[NetworkSection], made)


def preset(name: str, **changes: Any) -> NetworkSection:
    """Describe the network ``name`` of ``flowmaps.networks.PRESETS``, with ``changes`` to its arguments.

    Raises:
        UserError: There is no such preset, or the network does not have one of the options.
    """
    if name not in PRESETS:
        raise UserError(f"no such network: {choose(name, PRESETS)}", field="preset", value=name)
    found = PRESETS[name]
    cls: Callable[..., nn.Module] = NETWORKS[found.network]
    return network(cls, **{**found.options, **changes})
