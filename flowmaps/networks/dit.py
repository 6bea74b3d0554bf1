"""A diffusion transformer for images or latents, with two times."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import TimeEmbedding, without_label
from flowmaps.networks.conditions import ConditionEmbedding, given_rows
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import Dropout, check_sizes, layer_norm, rms_norm, run, zero
from flowmaps.networks.preconditioning import Preconditioned
from samplers.callables import expand


def positions(size: int, width: int) -> Tensor:
    """Return sines and cosines of row and column of a ``size`` x ``size`` grid of patches: [size^2, width].

    Half of the width is for each coordinate, at frequencies 10000^(-k / (width / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    phases = [coordinate.flatten()[:, None] * frequencies for coordinate in (columns, rows)]
    return torch.cat([part for phase in phases for part in (phase.sin(), phase.cos())], dim=1).float()


def modulation(layer: nn.Module, embedding: Tensor, x: Tensor, count: int, rms: bool) -> tuple[Tensor, ...]:
    """Return ``count`` shifts, scales and gates [B, width] for x, each of root mean square 1 if ``rms``."""
    parts: tuple[Tensor, ...] = layer(embedding).to(x.dtype).chunk(count, dim=1)
    return tuple(map(rms_norm, parts)) if rms else parts


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rms: bool, eps: float = 1e-6) -> Tensor:
    """Normalise tokens [B, n, width] without weights, if ``rms`` without their mean; scale and shift by [B, width]."""
    return torch.addcmul(shift[:, None], rms_norm(x) if rms else layer_norm(x, eps), 1 + scale[:, None])


class Attention(nn.Module):
    """Self-attention over tokens [B, n, width]; ``qk_norm``: queries and keys get root mean square 1, then a weight."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scales = nn.Parameter(torch.ones(2, width // heads)) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads c) -> three b heads n c", three=3, heads=self.heads)
        if self.scales is not None:
            q, k = (rms_norm(y) * scale.to(y.dtype) for y, scale in zip((q, k), self.scales, strict=True))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(rearrange(y, "b heads n c -> b n (heads c)"))
        return out


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the embedding; starts as the identity."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float, eps: float, rms: bool
    ) -> None:
        super().__init__()
        self.eps, self.rms = eps, rms
        hidden = int(width * mlp_ratio)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.modulation, embedding, x, 6, self.rms)
        x = torch.addcmul(x, gate1[:, None], self.attention(modulate(x, shift1, scale1, self.rms)))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(x, shift2, scale2, self.rms, self.eps)))


class DiT(Preconditioned, ModelMixin, ConfigMixin):
    """v(x, s, t, label) for x [B, channels, image_size, image_size]: a transformer over patches.

    Peebles and Xie 2023 (arXiv 2212.09748), with adaLN-zero modulation; the second time's embedding is added and starts
    at zero (``conditioning.TimeEmbedding``). ``qk_norm`` normalises queries and keys, which keeps attention's
    derivative in check. ``variant="diffusers"`` is the network as diffusers' DiTTransformer2DModel computes it: the
    level's frequencies reach 1e-4, and the second norm of a block adds 1e-5 to the variance.

    ``decoupled`` is the number of blocks, from the first on, that know s alone; the others and the head know t alone
    (0: all know both). It has the parameters of the network without, and at s = t it is the same function bit for bit:
    DMF (arXiv 2510.24474), which makes a map of a drift. ``norm="rms"`` divides tokens, and every shift, scale and gate
    of the modulation, by their root mean square; ``label_scale`` multiplies v of rows with a label, by the weight of
    baked-in guidance: both are Terminal Velocity Matching's (arXiv 2511.19797). ``gap_embedding`` is the MLP for t - s:
    "narrow", "wide" or, in a decoupled network, "none" (``conditioning.TimeEmbedding``). ``data_std``,
    ``augment_dim``, ``guidance``, ``guidance_interval``, ``convention``, ``base_std`` and ``condition`` as in ``UNet``;
    a ``condition`` (n, dim) is n further tokens, before the patches.
    """

    _supports_gradient_checkpointing = True

    @registered
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 4,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        dropout: float = 0.0,
        num_classes: int = 0,
        data_std: float = 0.5,
        augment_dim: int = 0,
        guidance: bool = False,
        guidance_interval: bool = False,
        convention: str = "",
        base_std: float = 0.5,
        variant: str = "",
        decoupled: int = 0,
        norm: str = "layer",
        label_scale: float = 1.0,
        gap_embedding: str = "narrow",
        condition: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if variant not in ("", "diffusers"):
            raise ValueError(f"variant must be diffusers or empty, got {variant}")
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm must be layer or rms, got {norm}")
        if gap_embedding not in ("narrow", "wide", "none"):
            raise ValueError(f"gap_embedding must be narrow, wide or none, got {gap_embedding}")
        check_sizes(self.config)
        self.conditioned(self.config, tokens=True)
        if gap_embedding == "none" and not decoupled:
            raise ValueError("gap_embedding=none needs decoupled: no block would know t")
        if decoupled > depth:
            raise ValueError(f"decoupled ({decoupled}) must not be above depth ({depth})")
        if not 0 < label_scale < math.inf or (label_scale != 1 and not num_classes):
            raise ValueError(f"label_scale must be positive, and 1 without classes, got {label_scale}")
        if not 1 <= mlp_ratio * width <= 65_536 or image_size // patch > 1024:
            raise ValueError("mlp_ratio must give 1 to 65,536 channels, and patch at most 1024 patches per side")
        if image_size % patch or width % heads or width % 4:
            raise ValueError(
                f"image_size ({image_size}) must be divisible by patch ({patch}), width ({width}) by heads ({heads}) "
                "and by 4"
            )
        self.precondition(convention, base_std, data_std)
        self.patch, self.size, self.num_classes = patch, image_size // patch, num_classes
        self.decoupled, self.rms, self.label_scale = decoupled, norm == "rms", label_scale
        self.gradient_checkpointing = False
        self.register_buffer("positions", positions(self.size, width), persistent=False)
        pixels = channels * patch**2
        self.stem = nn.Linear((channels + self.images) * patch**2, width)
        self.tokens = ConditionEmbedding(condition, width) if len(condition) == 2 else None
        eps = 1e-5 if variant else 1e-6
        last = 10000.0 ** -(1 if variant else 127 / 128) if convention else 32.0
        told = (num_classes, condition, augment_dim, guidance, guidance_interval)
        self.embedding = TimeEmbedding(256, width, *told, last=last, gap=gap_embedding)
        sizes = (width, heads, mlp_ratio, qk_norm, dropout, eps, self.rms)
        self.blocks = nn.ModuleList(TransformerBlock(*sizes) for _ in range(depth))
        self.modulation, self.head = zero(nn.Linear(width, 2 * width)), zero(nn.Linear(width, pixels))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and (name == "stem" or ("blocks" in name and "modulation" not in name)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Apply the transformer: F of the parametrisation, or v / data_std."""
        p = self.patch
        x = self.stem(rearrange(self.with_image(x, label), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        x = x + self.positions.to(x.dtype)
        if self.tokens is not None:
            rows = given_rows(label, s, self.tokens.shape)
            x = torch.cat([self.tokens(rows).to(x.dtype), x], dim=1)
        first = last = F.silu(self.embedding(level, s, s if self.decoupled else t, label))
        if self.decoupled:
            last = F.silu(self.embedding(self.level(t), t, t, label))
        for i, block in enumerate(self.blocks):
            x = run(self, block, x, first if i < self.decoupled else last)
        if self.tokens is not None:
            x = x[:, -(self.size**2) :]
        shift, scale = modulation(self.modulation, last, x, 2, self.rms)
        x = self.head(modulate(x, shift, scale, self.rms))
        if self.label_scale != 1 and label is not None:
            _, has_label = without_label(label, self.num_classes)
            x = x * expand(torch.where(has_label, self.label_scale, 1.0).to(x.dtype), x)
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.size, p=p, q=p)
