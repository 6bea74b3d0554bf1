"""Input and output scaling of a network: this package's own, or that of the parametrisation its weights come from."""

import math

from torch import Tensor

from flowmaps.networks.conditions import Conditioned, condition_rows
from flowmaps.parametrisations import parametrisation
from samplers.callables import expand


class Preconditioned(Conditioned):
    """v_{s,t}(x) from ``body(x, level, s, t, label)``, the network proper.

    By default the input is divided and the output multiplied by ``data_std``, and level is s. With a name that
    ``flowmaps.parametrisations.parametrisation`` knows, the body is F of that parametrisation at s = t, with level =
    c_noise; before training, s is its only time. The noise has standard deviation ``base_std``.
    """

    def precondition(self, convention: str, base_std: float, data_std: float) -> None:
        """Set the scaling, in a network's constructor; an empty ``convention`` is the default."""
        found = parametrisation(convention) if convention else None
        if not (0 < base_std < math.inf and 0 < data_std < math.inf):
            raise ValueError(f"base_std and data_std must be positive, got {base_std} and {data_std}")
        self.base_std, self.data_std = base_std, data_std
        self.parametrisation = found

    def level(self, t: Tensor) -> Tensor:
        """Return the noise level of times t [B] as the network proper takes it."""
        if self.parametrisation is None:
            return t
        return self.parametrisation(t, self.base_std, self.data_std).c_noise

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Compute F, the network proper."""
        raise NotImplementedError

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v_{s,t}(x), same shape as ``x``."""
        label = condition_rows(label, self.condition)
        if self.parametrisation is None:
            return self.data_std * self.body(x / self.data_std, s, s, t, label)
        c_in, c_noise, c_skip, c_out = self.parametrisation(s, self.base_std, self.data_std)
        c_in, c_skip, c_out = (expand(c, x).to(x.dtype) for c in (c_in, c_skip, c_out))
        return c_skip * x + c_out * self.body(c_in * x, c_noise, s, t, label)
