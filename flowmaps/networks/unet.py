"""A U-Net for images, after the DDPM++/ADM/EDM line, with two times."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import TimeEmbedding
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import (
    Dropout,
    GroupNorm,
    SelfAttention,
    Stage,
    check_unet,
    normalise,
    resample,
    run,
    smooth,
    u_shape,
    zero,
)
from flowmaps.networks.preconditioning import Preconditioned


class Variant(NamedTuple):
    """Differences between the U-Nets of this line."""

    resampling: str  # resolution changes in separate residual blocks ("block"), or between blocks ("pool", "conv")
    scale: bool  # scale and shift by the embedding after the second norm; else add it before
    skip_scale: float  # factor of every sum of a branch and its skip
    head_channels: int | None  # of attention; None: one head
    up_attention: bool  # in every decoder block of a level, else in the last one
    label_first: bool  # class vectors enter before the time MLP
    eps: float
    endpoint: bool = False  # with a convention: the level's frequencies reach 1e-4, else stop one short
    asymmetric: bool = False  # "conv" pads right and bottom only
    ncsn: bool = False  # smoothed resampling, the input again at every level, frequencies that travel with the weights


# ADM: Dhariwal and Nichol 2021 (arXiv 2105.05233); DDPM++, NCSN++: Song et al. 2021 (arXiv 2011.13456); all as EDM has
# them, Karras et al. 2022 (arXiv 2206.00364), table 1 and appendix F.6. "small" is ADM without resampling blocks and
# with attention at the listed resolutions only, for small images on a CPU. "ddpm": Ho et al. 2020 (arXiv 2006.11239) as
# in diffusers' UNet2DModel, "diffusers": that class with its defaults.
VARIANTS = {
    "small": Variant("pool", True, 1.0, 64, True, False, 1e-5),
    "adm": Variant("block", True, 1.0, 64, True, False, 1e-5),
    "ddpm++": Variant("block", False, math.sqrt(0.5), None, False, True, 1e-6, endpoint=True),
    "ncsn++": Variant("block", False, math.sqrt(0.5), None, False, True, 1e-6, endpoint=True, ncsn=True),
    "ddpm": Variant("conv", False, 1.0, None, True, False, 1e-6, endpoint=True, asymmetric=True),
    "diffusers": Variant("conv", False, 1.0, 8, True, False, 1e-5),
}


class Block(nn.Module):
    """Residual block: norm, SiLU, resampling, conv, norm and embedding, SiLU, dropout, conv (starts at zero)."""

    def __init__(
        self, stage: Stage, embedding: int, dropout: float, attention: bool, variant: Variant, groups: int = 0
    ) -> None:
        super().__init__()
        inputs, channels, eps = stage.inputs, stage.channels, variant.eps
        self.resample, self.skip_scale, self.smoothed = stage.resample, variant.skip_scale, variant.ncsn
        self.eps, self.groups = eps, groups
        self.norm1 = GroupNorm(inputs, eps, groups)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, channels * (1 + variant.scale))
        self.norm2 = None if variant.scale else GroupNorm(channels, eps, groups)
        if variant.scale:  # its bias is the affine part of the second norm
            nn.init.ones_(self.modulation.bias[:channels])
            nn.init.zeros_(self.modulation.bias[channels:])
        self.dropout = Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        projected = inputs != channels or (stage.resample != "keep" and not variant.scale)
        self.skip = nn.Conv2d(inputs, channels, 1) if projected else nn.Identity()
        heads = variant.head_channels or channels
        self.attention = SelfAttention(channels, heads, eps, groups) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(resample(F.silu(self.norm1(x)), self.resample, self.smoothed))
        modulation = self.modulation(embedding)[:, :, None, None].to(y.dtype)
        if self.norm2 is not None:
            y = self.norm2(y + modulation)
        else:
            scale, shift = modulation.chunk(2, dim=1)
            y = torch.addcmul(shift, normalise(y, self.eps, self.groups), scale)
        y = self.conv2(self.dropout(F.silu(y)))
        x = self.scaled(self.skip(resample(x, self.resample, self.smoothed)) + y)
        return x if self.attention is None else self.scaled(self.attention(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1 else x * self.skip_scale


class Resample(nn.Module):
    """Change of resolution in place of a block: without weights, with stride 2, or followed by a convolution."""

    def __init__(self, stage: Stage, variant: Variant) -> None:
        super().__init__()
        self.resample, self.asymmetric = stage.resample, variant.asymmetric
        self.conv = nn.Conv2d(stage.channels, stage.channels, 3) if variant.resampling == "conv" else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.conv is None:
            return resample(x, self.resample)
        weight, bias = self.conv.weight, self.conv.bias
        if self.resample == "up":
            return F.conv2d(resample(x, "up"), weight, bias, padding=1)
        return F.conv2d(F.pad(x, (0, 1, 0, 1) if self.asymmetric else (1, 1, 1, 1)), weight, bias, stride=2)


class UNet(Preconditioned, ModelMixin, ConfigMixin):
    """v(x, s, t, label) for images x [B, channels, image_size, image_size], from 8x8 up.

    Args:
        image_size: Height and width of x.
        channels: Channels of x.
        width: Channels of the first level; the embedding has four times as many.
        channel_mult: Channels of each level in units of ``width``. Each further level halves the resolution.
        blocks: Residual blocks per level.
        attention_resolutions: Resolutions, after folding, of the levels with self-attention.
        dropout: Probability in the residual blocks.
        num_classes: Number of classes, 0 for an unconditional network.
        data_std: Divides the input and multiplies the output (no skip, no time-dependent scaling), as in Boffi et al.
            2025.
        patch: Above 1, fold patch x patch pixels into channels first, for small images on a CPU.
        augment_dim: Number of augmentation parameters in the label (``conditioning.soft_label``).
        guidance: True to condition on a guidance weight in the label (``conditioning.with_guidance``).
        guidance_interval: True to condition on the times of guidance too.
        variant: A key of ``VARIANTS``: the U-Net of a paper, or "small".
        convention: Parametrisation of imported weights, empty for this package's
            (``preconditioning.Preconditioned``).
        base_std: Standard deviation of the noise, for ``convention``.
        norm_groups: Groups of every normalisation, 0 for up to 32 of at least 4 channels.
        head_channels: Channels of an attention head, 0 for those of the variant; a level with fewer has one head.
        condition: The shape of a condition in place of a class: a vector (dim,), added to the embedding, or an image
            (channels, image_size, image_size), concatenated to x. Empty for none.

    Raises:
        ValueError: The arguments do not fit together, such as a resolution that cannot be halved.

    Example:
        >>> network = UNet(image_size=32, channels=1, width=32, channel_mult=(1, 2), blocks=1, num_classes=10)
        >>> v = network(torch.randn(4, 1, 32, 32), torch.zeros(4), torch.ones(4), torch.tensor([0, 1, 2, 10]))
    """

    _supports_gradient_checkpointing = True

    @registered
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
        guidance_interval: bool = False,
        variant: str = "small",
        convention: str = "",
        base_std: float = 0.5,
        norm_groups: int = 0,
        head_channels: int = 0,
        condition: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant}")
        check_unet(self.config)
        self.conditioned(self.config)
        if norm_groups and width % norm_groups:
            raise ValueError(f"width ({width}) must be divisible by norm_groups ({norm_groups})")
        self.precondition(convention, base_std, data_std)
        self.patch, self.gradient_checkpointing = patch, False
        chosen = VARIANTS[variant]
        chosen = chosen._replace(head_channels=head_channels or chosen.head_channels)
        size, embedding = image_size // patch, 4 * width
        pixels, outputs = (channels + self.images) * patch**2, channels * patch**2
        features = embedding if variant == "small" else width * (1 + chosen.ncsn)
        last = 10000.0 ** -(1 if chosen.endpoint else 1 - 2 / features) if convention else 32.0
        self.embedding = TimeEmbedding(
            features,
            embedding,
            num_classes,
            condition,
            augment_dim,
            guidance,
            guidance_interval,
            chosen.label_first,
            last,
            chosen.ncsn,
        )
        self.stem = nn.Conv2d(pixels, width, 3, padding=1)
        down, up = u_shape(size, width, tuple(mult * width for mult in channel_mult), blocks)

        def block(stage: Stage, attention: bool) -> nn.Module:
            if stage.resample != "keep" and chosen.resampling != "block":
                return Resample(stage, chosen)
            return Block(stage, embedding, dropout, attention, chosen, norm_groups)

        def listed(stage: Stage) -> bool:
            return stage.resample == "keep" and stage.size in attention_resolutions

        self.down = nn.ModuleList(block(stage, listed(stage)) for stage in down)
        halved = [stage.channels for stage in down if stage.resample == "down"] if chosen.ncsn else []
        self.residuals = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=2) for a, b in zip([pixels, *halved], halved, strict=False)
        )
        low = Stage("keep", down[-1].channels, down[-1].channels, down[-1].size)
        self.middle = nn.ModuleList([block(low, chosen.resampling != "pool" or listed(low)), block(low, False)])
        self.up = nn.ModuleList(block(stage, listed(stage) and (stage.last or chosen.up_attention)) for stage in up)
        self.head = nn.Sequential(
            GroupNorm(up[-1].channels, chosen.eps, norm_groups),
            nn.SiLU(),
            zero(nn.Conv2d(up[-1].channels, outputs, 3, padding=1)),
        )

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Apply the U-Net: F of the parametrisation, or v / data_std."""
        p = self.patch
        x = rearrange(self.with_image(x, label), "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        embedding = F.silu(self.embedding(level, s, t, label))
        again, residuals = x, iter(self.residuals)
        x = self.stem(x)
        skips = [x]
        for block in self.down:
            x = run(self, block, x, embedding)
            if self.residuals and block.resample == "down":  # the input, halved again and again, in NCSN++
                again = F.avg_pool2d(smooth(next(residuals)(again), padding=0), 2)
                x = again = (x + again) * math.sqrt(0.5)
            skips.append(x)
        for block in self.middle:
            x = run(self, block, x, embedding)
        for block in self.up:
            if block.resample == "keep":
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(self, block, x, embedding)
        out: Tensor = self.head(x)
        return rearrange(out, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
