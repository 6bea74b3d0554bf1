"""Magnitude-preserving layers: unit variance in, unit variance out, at any training step.

Karras et al. 2024 (EDM2, arXiv 2312.02696), section 2.3 and appendix B; equation numbers are theirs. A weight is used
as w / |w|, so its size has no meaning, and ``normalise_weights`` resets it after every optimiser step: the learning
rate is then the angle by which weights turn.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """Divide x by its root mean square along ``dim``: pixel and weight normalisation (66).

    The mean is in at least float32. Squares keep the type of x, as in the authors' code, so that no float32 copy of
    an activation is kept for the backward pass; CUDA's autocast would make one in x.square().
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = x.square() if x.dtype == wide else x * x
    rms = (squares.mean(dim=dim, keepdim=True, dtype=wide) + 1e-30).sqrt()  # the constant gives a derivative at 0
    return x / (rms + eps).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by the root mean square of its output for unit Gaussian input (81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, divided by its size for independent unit a and b (88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def mp_add(a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
    """a + gain b with a learned ``gain``, divided by its size in the same way: a at gain 0, half of each at gain 1."""
    gain = gain.to(a.dtype)
    return (a + gain * b) / (1 + gain.square()).sqrt().to(a.dtype)  # CUDA's autocast squares in float32


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate the channels of a and b, scaled to contribute equally to the next layer (103), share 1/2."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / 2)
    return torch.cat([a * (scale / math.sqrt(n)), b * (scale / math.sqrt(m))], dim=1)


class MPLayer(nn.Module):
    """Linear layer (``kernel`` 0) or convolution without bias, its weight normalised for each output (47, 66)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *(kernel, kernel) if kernel else ()))
        normalise_weights(self)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return ``gain`` times the layer's output, which has unit variance at gain 1."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = unit(self.weight.to(wide), tuple(range(1, self.weight.ndim)))
        weight = (weight * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)


@torch.no_grad()
def normalise_weights(module: nn.Module, eps: float = 1e-4) -> None:
    """Set the weights of each output of each layer to root mean square 1, as ``unit`` does, in few kernels.

    This is forced weight normalisation (section 2.3); call it after each optimiser step.
    """
    layers = [layer.weight for layer in module.modules() if isinstance(layer, MPLayer)]
    if not layers:
        return
    weights: list[Tensor] = [getattr(w, "to_local", w.detach)() for w in layers]  # sharding keeps outputs in one piece
    rms = [torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True) for w in weights]
    torch._foreach_div_(rms, [math.sqrt(w.shape[1:].numel()) for w in weights])
    torch._foreach_add_(rms, eps)
    for weight, size in zip(weights, rms, strict=True):
        weight.div_(size)
