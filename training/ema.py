"""Moving averages of a network's weights."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from flowmaps.posthoc_ema import exponent
from training.fsdp import fill, local, whole


def _exponential(decay: float, step: int) -> float:
    return min(decay, (1 + step) / (10 + step))


def _power(gamma: float, step: int) -> float:
    return float((1 - 1 / step) ** (gamma + 1))


class EMA:
    """Several averages of one network: shadow <- shadow + (1 - d) (weights - shadow), in float32.

    Of ``decays``, each rises from 0 as (1 + n) / (10 + n) over the first n updates up to its own value, so that a short
    run is not averaged with its initialisation. Of ``widths``, each is the relative standard deviation of a
    power-function average (``exponent``): d = (1 - 1 / n)^(gamma + 1), which gives the weights of step k after n steps
    the share (k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1). Averages are known by name: "0.999", "width-0.05".
    The live weights are never swapped. Of a sharded network each process averages its part; ``state``, ``load`` and
    ``network``, which have to do with whole weights, are then for all processes at once.
    """

    def __init__(
        self,
        network: nn.Module,
        decays: tuple[float, ...],
        widths: tuple[float, ...] = (),
        hollow: nn.Module | None = None,
    ) -> None:
        """``hollow``: what ``hollowed`` made of the network before it was sharded, if it is."""
        self.rates: dict[str, Callable[[int], float]] = {str(d): partial(_exponential, d) for d in decays}
        self.rates |= {f"width-{w}": partial(_power, exponent(w)) for w in widths}
        self.hollow = hollowed(network) if hollow is None else hollow
        live = network.state_dict(keep_vars=True)
        self.shadows = {name: {k: _shadow(v) for k, v in live.items()} for name in self.rates}
        self._floats = {k: v for k, v in live.items() if v.is_floating_point()}
        self._others = {k: v for k, v in live.items() if not v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` = 1, 2, ..."""
        weights = [local(v.detach()).float() for v in self._floats.values()]
        for name, shadow in self.shadows.items():
            torch._foreach_lerp_([local(shadow[k]) for k in self._floats], weights, 1 - self.rates[name](step))
            for k, v in self._others.items():
                shadow[k].copy_(v)

    def state(self, name: str | float) -> dict[str, Tensor]:
        """The averaged weights by name, whole."""
        return {k: whole(v) for k, v in self.shadows[str(name)].items()}

    def load(self, name: str | float, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        for k, v in self.shadows[str(name)].items():
            fill(v, state[k])

    def network(self, name: str | float) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        averaged = copy.deepcopy(self.hollow).requires_grad_(False).eval()
        kinds = {k: v.dtype for k, v in averaged.state_dict().items()}
        state = {k: v.to(kinds[k], copy=True) for k, v in self.state(name).items()}
        averaged.load_state_dict(state, assign=True)
        return averaged


def hollowed(network: nn.Module) -> nn.Module:
    """A copy of ``network`` whose weights take no memory."""
    hollow = copy.deepcopy(network)
    hollow.load_state_dict({k: v.to("meta") for k, v in hollow.state_dict().items()}, assign=True)
    return hollow


def _shadow(tensor: Tensor) -> Tensor:
    """A copy, in float32 if it is a float of any kind."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
