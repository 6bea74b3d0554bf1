"""A diffusion transformer for images or latents, with two times."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import TimeEmbedding
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import Dropout, check_sizes, layer_norm, own_type, run, zero
from flowmaps.networks.preconditioning import Preconditioned


def positions(size: int, width: int) -> Tensor:
    """Return sines and cosines of row and column of a ``size`` x ``size`` grid of patches: [size^2, width].

    Half of the width is for each coordinate, at frequencies 10000^(-k / (width / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    phases = [coordinate.flatten()[:, None] * frequencies for coordinate in (columns, rows)]
    return torch.cat([part for phase in phases for part in (phase.sin(), phase.cos())], dim=1).float()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide x by its root mean square along the last dimension and multiply by ``weight``."""
    with own_type(x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise tokens [B, n, width] without weights, then scale and shift by [B, width]."""
    return torch.addcmul(shift[:, None], layer_norm(x, eps), 1 + scale[:, None])


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
            q, k = rms_norm(q, self.scales[0]), rms_norm(k, self.scales[1])
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(rearrange(y, "b heads n c -> b n (heads c)"))
        return out


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the embedding; starts as the identity."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float, eps: float) -> None:
        super().__init__()
        self.eps = eps
        hidden = int(width * mlp_ratio)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).to(x.dtype).chunk(6, dim=1)
        x = torch.addcmul(x, gate1[:, None], self.attention(modulate(x, shift1, scale1)))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(x, shift2, scale2, self.eps)))


class DiT(Preconditioned, ModelMixin, ConfigMixin):
    """v(x, s, t, label) for x [B, channels, image_size, image_size]: a transformer over patches.

    Peebles and Xie 2023 (arXiv 2212.09748), with adaLN-zero modulation; the second time's embedding is added and starts
    at zero (``conditioning.TimeEmbedding``). ``qk_norm`` normalises queries and keys, which keeps attention's
    derivative in check. ``variant="diffusers"`` is the network as diffusers' DiTTransformer2DModel computes it: the
    level's frequencies reach 1e-4, and the second norm of a block adds 1e-5 to the variance. ``data_std``,
    ``augment_dim``, ``guidance``, ``guidance_interval``, ``convention`` and ``base_std`` as in ``UNet``.
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
    ) -> None:
        super().__init__()
        if variant not in ("", "diffusers"):
            raise ValueError(f"variant must be diffusers or empty, got {variant}")
        check_sizes(self.config)
        if not 1 <= mlp_ratio * width <= 65_536 or image_size // patch > 1024:
            raise ValueError("mlp_ratio must give 1 to 65,536 channels, and patch at most 1024 patches per side")
        if image_size % patch or width % heads or width % 4:
            raise ValueError(
                f"image_size ({image_size}) must be divisible by patch ({patch}), width ({width}) by heads ({heads}) "
                "and by 4"
            )
        self.precondition(convention, base_std, data_std)
        self.patch, self.size = patch, image_size // patch
        self.gradient_checkpointing = False
        self.register_buffer("positions", positions(self.size, width), persistent=False)
        pixels = channels * patch**2
        self.stem = nn.Linear(pixels, width)
        eps = 1e-5 if variant else 1e-6
        last = 10000.0 ** -(1 if variant else 127 / 128) if convention else 32.0
        self.embedding = TimeEmbedding(256, width, num_classes, augment_dim, guidance, guidance_interval, last=last)
        sizes = (width, heads, mlp_ratio, qk_norm, dropout, eps)
        self.blocks = nn.ModuleList(TransformerBlock(*sizes) for _ in range(depth))
        self.modulation, self.head = zero(nn.Linear(width, 2 * width)), zero(nn.Linear(width, pixels))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and (name == "stem" or ("blocks" in name and "modulation" not in name)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Apply the transformer: F of the parametrisation, or v / data_std."""
        p = self.patch
        x = self.stem(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        x = x + self.positions.to(x.dtype)
        embedding = F.silu(self.embedding(level, s, t, label))
        for block in self.blocks:
            x = run(self, block, x, embedding)
        shift, scale = self.modulation(embedding).to(x.dtype).chunk(2, dim=1)
        x = self.head(modulate(x, shift, scale))
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.size, p=p, q=p)
