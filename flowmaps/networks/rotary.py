"""Layers of a transformer without modulation: rotated attention, and tokens for conditions."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.layers import rms_norm

FEATURES = 256  # of a number


def turns(places: Tensor, size: int) -> Tensor:
    """Return cos and sin of the angles at ``places`` [n]: [2, n, size / 2], place times 10000^(-2 i / size)."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = places[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def sequence_turns(tokens: int, size: int) -> Tensor:
    """Return ``turns`` of a head of ``size`` channels for a sequence: token j is turned by j."""
    return turns(torch.arange(tokens, dtype=torch.float64), size).float()


def grid_turns(before: int, side: int, size: int) -> Tensor:
    """Return ``turns`` for ``before`` tokens that are not turned, then a grid of ``side`` x ``side``.

    Half of the pairs of channels is turned by the row, the other half by the column.
    """
    places = torch.arange(side, dtype=torch.float64)
    rows, columns = (part.flatten() for part in torch.meshgrid(places, places, indexing="ij"))
    grid = torch.cat([turns(rows, size // 2), turns(columns, size // 2)], dim=2)
    still = torch.stack([torch.ones(before, size // 2), torch.zeros(before, size // 2)])
    return torch.cat([still, grid.float()], dim=1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of channels (2 i, 2 i + 1) of x [B, heads, n, c] by angles with (cos, sin) [2, n, c / 2]."""
    cos, sin = rotation.to(x.dtype)
    a, b = rearrange(x, "... (pairs two) -> two ... pairs", two=2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, then a weight for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x) * self.weight.to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention over tokens [B, n, width] whose queries and keys are normalised, then rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b n (heads c) -> b heads n c", heads=self.heads) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation), v)
        out: Tensor = self.out(rearrange(y, "b heads n c -> b n (heads c)"))
        return out


class SwiGLU(nn.Module):
    """W2(SiLU(W1 x) W3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class PlainBlock(nn.Module):
    """Attention and SwiGLU, each normalised before and scaled by channel after; starts as the identity."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention, self.mlp = RotaryAttention(width, heads), SwiGLU(width, hidden)
        self.attention_scale, self.mlp_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = torch.addcmul(x, self.attention_scale.to(x.dtype), self.attention(self.norm1(x), rotation).to(x.dtype))
        return torch.addcmul(x, self.mlp_scale.to(x.dtype), self.mlp(self.norm2(x)).to(x.dtype))


class ConditionTokens(nn.Module):
    """Tokens [B, count, width] of one condition: learned ones, plus the condition as a vector for all or one each."""

    def __init__(self, count: int, width: int, embed: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width) * width**-0.5)
        self.embed = embed

    def forward(self, told: Tensor) -> Tensor:
        """``told``: what ``embed`` takes, with the batch first."""
        embedded: Tensor = self.embed(told.to(self.tokens.dtype))
        return self.tokens + (embedded if embedded.ndim == 3 else embedded[:, None])


class Table(nn.Embedding):
    """A table of vectors [classes, width], looked up by one-hot rows [B, classes]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes, width)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


def number_mlp(width: int) -> nn.Sequential:
    """Return the MLP from the features of a number to a vector."""
    layers = [nn.Linear(FEATURES, width), nn.Linear(width, width)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1])
