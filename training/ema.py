"""Moving averages of a network's weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowmaps.posthoc_ema import exponent
from training.fsdp import copy_into_shard, full_tensor, local


def _exponential(decay: float, ramp: float, step: int) -> float:
    return min(decay, 0.5 ** (1 / (ramp * step)) if ramp else (1 + step) / (10 + step))


def _power(gamma: float, step: int) -> float:
    return float((1 - 1 / step) ** (gamma + 1))


class EMA:
    """Several moving averages of one network: shadow <- shadow + (1 - d) (weights - shadow), in float32.

    Each of ``decays`` rises as (1 + n) / (10 + n) over the first n updates up to its own value, so that the average of
    a short run does not contain its initialisation, or with a ``ramp`` as (1/2)^(1 / (ramp n)): the half-life is then
    at most that share of the steps so far. Each of ``widths`` is the relative standard deviation of a power-function
    average (``exponent``): d = (1 - 1 / n)^(gamma + 1), which gives the weights of step k after n steps the share (k /
    n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1). Averages have names: "0.999", "width-0.05". The live weights are never
    swapped. If the network is sharded, each process averages its part, and ``state``, ``load_state_dict`` and
    ``network``, which deal with full weights, are collective calls.
    """

    def __init__(
        self,
        network: nn.Module,
        decays: tuple[float, ...],
        widths: tuple[float, ...] = (),
        meta: nn.Module | None = None,
        ramp: float = 0.0,
    ) -> None:
        """``meta``: the ``meta_copy`` of the network from before it was sharded, if it was.

        What ``for_sampling`` of the network leaves out has no average.
        """
        self.rates: dict[str, Callable[[int], float]] = {str(d): partial(_exponential, d, ramp) for d in decays}
        self.rates |= {f"width-{w}": partial(_power, exponent(w)) for w in widths}
        self.meta = meta_copy(network) if meta is None else meta
        kept = self.meta.state_dict()
        live = {k: v for k, v in network.state_dict(keep_vars=True).items() if k in kept}
        self.shadows = {name: {k: _shadow(v) for k, v in live.items()} for name in self.rates}
        self._floats = {k: v for k, v in live.items() if v.is_floating_point()}
        self._others = {k: v for k, v in live.items() if not v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimiser step ``step`` = 1, 2, ... to the averages."""
        weights = [local(v.detach()).float() for v in self._floats.values()]
        for name, shadow in self.shadows.items():
            torch._foreach_lerp_([local(shadow[k]) for k in self._floats], weights, 1 - self.rates[name](step))
            for k, v in self._others.items():
                shadow[k].copy_(v)

    def state(self, name: str | float) -> dict[str, Tensor]:
        """Return the full averaged weights by parameter name."""
        return {k: full_tensor(v) for k, v in self.shadows[str(name)].items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by name, sharded as the network is."""
        return self.shadows

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore the averages from full tensors."""
        for name, shadow in self.shadows.items():
            for k, v in shadow.items():
                copy_into_shard(v, state[name][k])

    def network(self, name: str | float) -> nn.Module:
        """Return a copy of the network with the averaged weights, in eval mode."""
        averaged = copy.deepcopy(self.meta).requires_grad_(False).eval()
        kinds = {k: v.dtype for k, v in averaged.state_dict().items()}
        state = {k: v.to(kinds[k], copy=True) for k, v in self.state(name).items()}
        averaged.load_state_dict(state, assign=True)
        return averaged


def meta_copy(network: nn.Module) -> nn.Module:
    """Return ``sampling_copy(network)`` with its weights on the meta device, where they take no memory."""
    meta = sampling_copy(network)
    meta.load_state_dict({k: v.to("meta") for k, v in meta.state_dict().items()}, assign=True)
    return meta


def sampling_copy(network: Any) -> nn.Module:
    """Return a copy of ``network`` without what only training needs: its ``for_sampling``, if it has one."""
    made: nn.Module = network.for_sampling() if hasattr(network, "for_sampling") else copy.deepcopy(network)
    return made


def _shadow(tensor: Tensor) -> Tensor:
    """Return a copy, in float32 if the dtype is a floating-point one."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
