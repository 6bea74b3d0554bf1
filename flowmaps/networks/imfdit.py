"""The transformer of improved MeanFlow: conditions are tokens, and a second head learns the drift."""

import copy
from typing import Self, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import check_guidance, condition, time_features
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import check_sizes, rms_norm, run, without_tangent, zero

FEATURES, LAST = 256, 10000.0 ** -(127 / 128)  # of a number that is told: how many, and their lowest frequency
PREFIX = {"classes": 8, "guidance": 4, "high": 2, "low": 2, "gap": 4}  # tokens of each condition, in this order


def turns(places: Tensor, size: int) -> Tensor:
    """Return cos and sin of the angles at ``places`` [n]: [2, n, size / 2], place times 10000^(-2 i / size)."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = places[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def sequence_turns(tokens: int, size: int) -> Tensor:
    """Return ``turns`` of a head of ``size`` channels for a sequence: token j is turned by j."""
    return turns(torch.arange(tokens, dtype=torch.float64), size).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of channels (2 i, 2 i + 1) of x [B, heads, n, c] by angles with (cos, sin) [2, n, c / 2]."""
    cos, sin = rotation
    a, b = rearrange(x, "... (pairs two) -> two ... pairs", two=2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


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
    """Tokens [B, count, width] of one condition: learned ones, plus the condition as one vector for all of them."""

    def __init__(self, count: int, width: int, embed: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width) * width**-0.5)
        self.embed = embed

    def forward(self, told: Tensor) -> Tensor:
        """``told``: what ``embed`` takes, with the batch first."""
        embedded: Tensor = self.embed(told.to(self.tokens.dtype))
        return self.tokens + embedded[:, None]


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


class IMFDiT(ModelMixin, ConfigMixin):
    """v(x, s, t, label) for x [B, channels, image_size, image_size]: a transformer over patches and conditions.

    Geng et al. 2025 (arXiv 2512.02012), improved MeanFlow. The class (8 tokens), with ``guidance`` its weight (4), with
    ``guidance_interval`` its times (2 each), and the gap t - s (4) come before the patches; s itself is not told.
    Attention normalises queries and keys and rotates them by the position in the sequence; SwiGLU; RMSNorm; no
    modulation. The last ``head_depth`` of ``depth`` blocks are the head of v. With ``second_head`` as many others,
    behind the same trunk, give a second velocity, which ``improved_mean_flow`` trains as the drift: see ``pair`` and
    ``second``. Exports are without it (``for_sampling``). A fresh network gives 0.

    Args:
        image_size: Height and width of x.
        channels: Channels of x.
        patch: Side of a patch.
        width: Channels of a token.
        depth: Blocks that v passes.
        head_depth: How many of them, the last ones, are v's own.
        heads: Attention heads.
        hidden: Channels inside SwiGLU, 0 for 8/3 of ``width``, rounded down.
        num_classes: Number of classes, 0 for an unconditional network.
        data_std: Divides the input and multiplies the output.
        guidance: True to condition on a guidance weight in the label (``conditioning.with_guidance``).
        guidance_interval: True to condition on the times of guidance too.
        second_head: True to have the second velocity.

    Raises:
        ValueError: The arguments do not fit together.
    """

    _supports_gradient_checkpointing = True

    @registered
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 4,
        patch: int = 2,
        width: int = 768,
        depth: int = 12,
        head_depth: int = 8,
        heads: int = 12,
        hidden: int = 0,
        num_classes: int = 0,
        data_std: float = 0.5,
        guidance: bool = False,
        guidance_interval: bool = False,
        second_head: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(self.config)
        check_guidance(num_classes, guidance, guidance_interval)
        if not head_depth <= depth:
            raise ValueError(f"head_depth ({head_depth}) must not be above depth ({depth})")
        if image_size // patch > 1024:
            raise ValueError("patch must give at most 1024 patches per side")
        if image_size % patch or width % (2 * heads):
            raise ValueError(
                f"image_size ({image_size}) must be divisible by patch ({patch}), width ({width}) by twice the heads "
                f"({heads})"
            )
        if not 0 < data_std < float("inf"):
            raise ValueError(f"data_std must be positive, got {data_std}")
        self.patch, self.size, self.num_classes, self.data_std = patch, image_size // patch, num_classes, data_std
        self.guidance, self.interval = guidance, guidance_interval
        self.gradient_checkpointing = False
        told = {"classes": num_classes > 0, "guidance": guidance, "high": guidance_interval, "low": guidance_interval}
        classes, hidden = num_classes + 1, hidden or 8 * width // 3
        self.prefix = nn.ModuleDict(
            {
                name: ConditionTokens(count, width, Table(classes, width) if name == "classes" else number_mlp(width))
                for name, count in PREFIX.items()
                if told.get(name, True)
            }
        )
        before = sum(PREFIX[name] for name in self.prefix)
        self.register_buffer("rotation", sequence_turns(before + self.size**2, width // heads), persistent=False)
        pixels = channels * patch**2
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(PlainBlock(width, heads, hidden) for _ in range(count))

        def output() -> nn.Sequential:
            return nn.Sequential(RMSNorm(width), zero(nn.Linear(width, pixels)))

        self.blocks = blocks(depth - head_depth)
        self.head_blocks, self.head = blocks(head_depth), output()
        self.second_blocks = blocks(head_depth) if second_head else None
        self.second_output = output() if second_head else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                nn.init.normal_(module.weight, std=0.32 * module.in_features**-0.5)
        nn.init.xavier_uniform_(self.stem.weight.data.flatten(1))
        nn.init.zeros_(cast(Tensor, self.stem.bias))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v_{s,t}(x), same shape as ``x``."""
        trunk = self.trunk(x, s, t, label)
        return self.velocity(x, s, trunk, self.head_blocks, self.head)

    def second(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the second velocity alone, same shape as ``x``; its derivative is not kept."""
        return self._second(x, s, self.trunk(x, s, t, label))

    def pair(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``forward`` and ``second`` from one pass."""
        trunk = self.trunk(x, s, t, label)
        return self.velocity(x, s, trunk, self.head_blocks, self.head), self._second(x, s, trunk)

    def _second(self, x: Tensor, s: Tensor, trunk: Tensor) -> Tensor:
        if self.second_blocks is None or self.second_output is None:
            raise ValueError("this network was built without its second head")
        x, s, trunk = (without_tangent(value) for value in (x, s, trunk))
        return self.velocity(x, s, trunk, self.second_blocks, self.second_output)

    def trunk(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Return the tokens [B, n, width], conditions first, after the shared blocks."""
        given = condition(label, s, self.num_classes, 0, self.guidance, self.interval)
        numbers = {
            "guidance": 1 - 1 / given.guidance,
            "high": 1 - given.high,
            "low": 1 - given.low,
            "gap": t - s,
        }
        told = {name: time_features(number, FEATURES, LAST) for name, number in numbers.items()}
        told["classes"] = given.classes
        patches = self.stem(x / self.data_std).flatten(2).mT
        tokens = [part(told[name]).to(patches.dtype) for name, part in self.prefix.items()]
        return self.through(torch.cat([*tokens, patches], dim=1), self.blocks)

    def through(self, tokens: Tensor, blocks: nn.ModuleList) -> Tensor:
        """Apply ``blocks`` to tokens [B, n, width]."""
        for block in blocks:
            tokens = run(self, block, tokens, self.rotation)
        return tokens

    def velocity(self, x: Tensor, s: Tensor, trunk: Tensor, blocks: nn.ModuleList, output: nn.Module) -> Tensor:
        """Return the velocity at (x, s) that one head makes of the tokens ``trunk``."""
        tokens = self.through(trunk, blocks)[:, -(self.size**2) :]
        p = self.patch
        out = rearrange(output(tokens), "b (h w) (p q c) -> b c (h p) (w q)", h=self.size, p=p, q=p)
        v: Tensor = -self.data_std * out  # the authors' sign
        return v

    def for_sampling(self) -> Self:
        """Return a copy without the second head; the weights of a network on the meta device stay there."""
        made = copy.deepcopy(self)
        made.second_blocks = made.second_output = None
        made.register_to_config(second_head=False)
        return made
