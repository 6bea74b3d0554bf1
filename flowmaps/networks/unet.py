"""A U-Net for images, after the ADM/EDM line, with two times."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.layers import Dropout, GroupNorm, SelfAttention, TimeEmbedding, normalise, zero


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, norm modulated by the embedding, SiLU, dropout, conv (starts at zero)."""

    def __init__(self, inputs: int, channels: int, embedding: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)  # its bias is the affine part of the second norm
        nn.init.ones_(self.modulation.bias[:channels])
        nn.init.zeros_(self.modulation.bias[channels:])
        self.dropout = Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()
        self.attention = SelfAttention(channels) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].to(y.dtype).chunk(2, dim=1)
        y = F.silu(torch.addcmul(shift, normalise(y), scale))
        y = self.conv2(self.dropout(y))
        out: Tensor = self.attention(self.skip(x) + y)
        return out


class UNet(ModelMixin, ConfigMixin):
    """v(x, s, t, label) for images x [B, channels, image_size, image_size], from 8x8 up.

    ``patch`` > 1 folds patch x patch pixels into channels first, which is what a small image on a CPU wants.
    ``channel_mult`` gives the width of each level in units of ``width``; each level halves the resolution, and levels
    whose resolution is in ``attention_resolutions`` (counted after folding) get self-attention. Input is divided and
    output multiplied by ``data_std`` (no skip, no time-dependent scaling), as in Boffi et al. 2025. ``augment_dim`` > 0
    makes room for the parameters of an augmentation, given in the label (``layers.soft_label``), ``guidance`` for the
    weight of a guidance that is baked in (``layers.with_guidance``).
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        blocks: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        num_classes: int = 0,
        data_std: float = 0.5,
        patch: int = 1,
        augment_dim: int = 0,
        guidance: bool = False,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        if not channel_mult or min(image_size, channels, width, blocks, patch, *channel_mult) < 1:
            raise ValueError("image_size, channels, width, channel_mult, blocks and patch must be at least 1")
        if width % 2 or not data_std > 0 or not 0 <= dropout < 1 or min(num_classes, augment_dim) < 0:
            raise ValueError(
                "width must be even, data_std positive, dropout in [0, 1), num_classes and augment_dim not negative"
            )
        if image_size % (patch * 2 ** (levels - 1)):
            raise ValueError(
                f"image_size {image_size} cannot be folded by patch={patch} and halved {levels - 1} times: "
                "use fewer entries in channel_mult or another patch"
            )
        self.patch, self.data_std = patch, data_std
        size, embedding = image_size // patch, 4 * width
        pixels = channels * patch**2
        self.embedding = TimeEmbedding(embedding, num_classes, augment_dim, guidance)
        self.stem = nn.Conv2d(pixels, width, 3, padding=1)

        def block(inputs: int, outputs: int) -> Block:
            return Block(inputs, outputs, embedding, dropout, attention=size in attention_resolutions)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current = [width], width
        for level, mult in enumerate(channel_mult):
            if level:
                size //= 2
                skips.append(current)
            for _ in range(blocks):
                self.down.append(block(current, mult * width))
                current = mult * width
                skips.append(current)
        self.middle = nn.ModuleList([block(current, current), Block(current, current, embedding, dropout, False)])
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(blocks + 1):
                self.up.append(block(current + skips.pop(), mult * width))
                current = mult * width
            if level:
                size *= 2
        self.blocks = blocks
        self.levels = levels
        self.head = nn.Sequential(GroupNorm(current), nn.SiLU(), zero(nn.Conv2d(current, pixels, 3, padding=1)))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        p = self.patch
        x = rearrange(x / self.data_std, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        embedding = F.silu(self.embedding(s, t, label))
        x = self.stem(x)
        skips = [x]
        for i, block in enumerate(self.down):
            if i and i % self.blocks == 0:
                x = F.avg_pool2d(x, 2)
                skips.append(x)
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for i, block in enumerate(self.up):
            if i and i % (self.blocks + 1) == 0:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        x = rearrange(self.head(x), "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
        return self.data_std * x
