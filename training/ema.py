"""Exponential moving averages of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Several averages of one network: shadow <- shadow + (1 - d) (weights - shadow), in float32.

    The decay d rises from 0 as (1 + n) / (10 + n) over the first n updates up to its own value, so that a short run
    is not averaged with its initialisation. The live weights are never swapped.
    """

    def __init__(self, network: nn.Module, decays: tuple[float, ...]) -> None:
        self.live = network
        self.shadows = {decay: {k: _shadow(v) for k, v in network.state_dict().items()} for decay in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` = 1, 2, ..."""
        live = self.live.state_dict()
        names = [k for k, v in live.items() if v.is_floating_point()]
        weights = [live[k].float() for k in names]
        for decay, shadow in self.shadows.items():
            now = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([shadow[k] for k in names], weights, 1 - now)
            for k in live.keys() - set(names):
                shadow[k].copy_(live[k])

    def state(self, decay: float) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return self.shadows[decay]

    def load(self, decay: float, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        for k, v in self.shadows[decay].items():
            v.copy_(state[k])

    def network(self, decay: float) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        averaged = copy.deepcopy(self.live).requires_grad_(False).eval()
        averaged.load_state_dict(self.shadows[decay])
        return averaged


def _shadow(tensor: Tensor) -> Tensor:
    """A copy, in float32 if it is a float of any kind."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
