"""What a network's scales and times are: this package's own, or those of the convention its weights were trained in."""

from torch import Tensor

from flowmaps.parametrisations import CONVENTIONS
from samplers.callables import expand


class Preconditioned:
    """v_{s,t}(x) from ``body(x, level, s, t, label)``, the network proper.

    Without a convention, input is divided and output multiplied by ``data_std`` and the level is s. With one of
    ``flowmaps.parametrisations`` the body is what that calls F, at s = t, and s its only time before training; the
    noise has standard deviation ``base_std``.
    """

    def precondition(self, convention: str, base_std: float, data_std: float) -> None:
        """Choose, in a network's constructor."""
        if convention and convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, or empty, got {convention}")
        if not (base_std > 0 and data_std > 0):
            raise ValueError(f"base_std and data_std must be positive, got {base_std} and {data_std}")
        self.base_std, self.data_std = base_std, data_std
        self.convention = CONVENTIONS[convention] if convention else None

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The network proper."""
        raise NotImplementedError

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """v_{s,t}(x), same shape as ``x``."""
        if self.convention is None:
            return self.data_std * self.body(x / self.data_std, s, s, t, label)
        reading = self.convention(s, self.base_std, self.data_std)
        entry, skip, out = (expand(value, x).to(x.dtype) for value in (reading.entry, reading.skip, reading.out))
        return skip * x + out * self.body(entry * x, reading.level, s, t, label)
