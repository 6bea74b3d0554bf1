"""The magnitude-preserving U-Net of EDM2, with two times."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import check_guidance, split_label
from flowmaps.networks.conditions import label_size
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import Dropout, Stage, check_unet, heads_of, resample, run, u_shape
from flowmaps.networks.magnitude import MPLayer, mp_add, mp_cat, mp_silu, mp_sum, unit
from flowmaps.networks.preconditioning import Preconditioned

BALANCE = 0.3  # share of a branch in its sum with the skip
LABEL_BALANCE = 0.5
LIMIT = 256.0  # of activations


def raw_features(t: Tensor, channels: int) -> Tensor:
    """Return sqrt 2 cos and sqrt 2 sin of t [B] at ``channels / 2`` frequencies from 1 down to 1e-4: [B, channels].

    Boffi et al. 2025: Fourier features of higher frequency make the derivatives in time unstable.
    """
    k = torch.arange(channels // 2, device=t.device, dtype=t.dtype) / (channels // 2)
    phase = t[:, None] * 10000.0**-k
    return math.sqrt(2) * torch.cat([phase.cos(), phase.sin()], dim=1)


class MPEmbedding(nn.Module):
    """Embeds (s, t, label) as one vector [B, channels] of unit variance.

    The layer for s is summed with layers for t - s, for the augmentation, for the inverse of the guidance weight and,
    with ``interval``, for its times, each with a learned gain, then with the layer for the class at share 1/2 ("no
    label" is a zero vector). A condition that is a vector, whose numbers should have unit variance, takes the place of
    the class ("no label" is learned). The gains start at zero: a network with one time, loaded into this one, is the
    same function at s = t. A gain of 1 for t - s is the equal mixture of Boffi et al. 2025. ``random`` replaces the
    features of s by EDM2's, cos(level f + p) sqrt 2 with random f and p.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        features: int,
        channels: int,
        num_classes: int,
        condition: tuple[int, ...],
        augment_dim: int,
        guidance: bool,
        interval: bool,
        random: bool,
    ) -> None:
        super().__init__()
        self.size = label_size(num_classes, condition)
        check_guidance(self.size, guidance, interval)
        self.channels, self.augment_dim = features, augment_dim
        self.start, self.gap = MPLayer(features, channels), MPLayer(features, channels)
        self.label = MPLayer(num_classes, channels) if num_classes else None
        self.condition = MPLayer(self.size + 1, channels) if len(condition) == 1 else None
        self.augmentation = MPLayer(augment_dim, channels) if augment_dim else None
        self.guidance = MPLayer(features, channels) if guidance else None
        self.low = MPLayer(features, channels) if interval else None
        self.high = MPLayer(features, channels) if interval else None
        names = ("gap", *["augmentation"] * bool(augment_dim), *["guidance"] * guidance, *["low", "high"] * interval)
        self.random = random
        if random:
            self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
            self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.gains = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in names})

    def forward(self, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        guided, interval = self.guidance is not None, self.low is not None
        given = split_label(label, s, self.size, self.augment_dim, guided, interval)
        dtype = self.start.weight.dtype  # times keep their own precision until here

        def features(time: Tensor) -> Tensor:
            return raw_features(time, self.channels).to(dtype)

        start = features(level)
        if self.random:
            phase = torch.outer(level, self.frequencies.to(level.dtype)) + self.phases.to(level.dtype)
            start = (math.sqrt(2) * phase.cos()).to(dtype)
        x = mp_add(self.start(start), self.gap(features(t - s)), self.gains["gap"])
        if self.augmentation is not None:
            x = mp_add(x, self.augmentation(given.augmentation.to(dtype)), self.gains["augmentation"])
        told = (
            ("guidance", self.guidance, 1 / given.guidance),
            ("low", self.low, given.low),
            ("high", self.high, 1 - given.high),
        )
        for name, layer, value in told:
            if layer is not None:
                x = mp_add(x, layer(features(value)), self.gains[name])
        if self.label is not None:
            classes = given.rows[:, :-1].to(dtype) * math.sqrt(self.size)
            x = mp_sum(x, self.label(classes), LABEL_BALANCE)
        if self.condition is not None:
            numbers, absent = given.rows[:, :-1], given.rows[:, -1:]
            rows = torch.cat([numbers, absent * math.sqrt(self.size + 1)], dim=1).to(dtype)
            x = mp_sum(x, self.condition(rows), LABEL_BALANCE)
        return mp_silu(x)


class Block(nn.Module):
    """Residual block of unit variance: SiLU, conv, scale by the embedding, SiLU, dropout, conv; attention.

    The skip of an encoder block is normalised over channels, pixel by pixel. Attention is cosine attention: queries,
    keys and values are normalised.
    """

    def __init__(self, stage: Stage, embedding: int, dropout: float, attention: bool, encoder: bool) -> None:
        super().__init__()
        inputs, channels = stage.inputs, stage.channels
        self.resample, self.encoder = stage.resample, encoder
        self.skip = MPLayer(inputs, channels, 1) if inputs != channels else None
        self.conv1 = MPLayer(channels if encoder else inputs, channels, 3)
        self.modulation = MPLayer(embedding, channels)
        self.gain = nn.Parameter(torch.zeros(1))
        self.dropout = Dropout(dropout)
        self.conv2 = MPLayer(channels, channels, 3)
        self.heads = heads_of(channels, 64) if attention else 0
        self.qkv = MPLayer(channels, 3 * channels, 1) if attention else None
        self.out = MPLayer(channels, channels, 1) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = resample(x, self.resample)
        if self.encoder:
            x = unit(x if self.skip is None else self.skip(x), dim=1)
        y = self.conv1(mp_silu(x))
        scale = 1 + self.modulation(embedding, self.gain)[:, :, None, None].to(y.dtype)
        y = self.conv2(self.dropout(mp_silu(y * scale)))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, BALANCE)
        if self.qkv is not None and self.out is not None:
            x = mp_sum(x, self.out(self.attend(self.qkv(x))), BALANCE)
        return x.clamp(-LIMIT, LIMIT)

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend over pixels from [B, 3 C, h, w], where q, k and v alternate along the channels of each head."""
        h, w = qkv.shape[-2:]
        q, k, v = unit(rearrange(qkv, "b (heads c n) h w -> n b heads (h w) c", heads=self.heads, n=3), dim=-1)
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads (h w) c -> b (heads c) h w", h=h, w=w)


class EDM2UNet(Preconditioned, ModelMixin, ConfigMixin):
    """v(x, s, t, label) for images or latents x [B, channels, image_size, image_size].

    Karras et al. 2024 (EDM2, arXiv 2312.02696), configuration G, as Boffi et al. 2025 use it: the two times enter as
    (s, t - s) through ``raw_features``, nothing else depends on time. Trained with ``magnitude.normalise_weights``
    after each step, it tolerates learning rates of 1e-2 and more. Arguments as in ``UNet``.
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
        augment_dim: int = 0,
        guidance: bool = False,
        guidance_interval: bool = False,
        convention: str = "",
        base_std: float = 0.5,
        condition: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        check_unet(self.config)
        self.conditioned(self.config)
        self.precondition(convention, base_std, data_std)
        self.gradient_checkpointing = False
        widths = tuple(mult * width for mult in channel_mult)
        embedding = max(widths)
        self.embedding = MPEmbedding(
            widths[0], embedding, num_classes, condition, augment_dim, guidance, guidance_interval, bool(convention)
        )
        self.stem = MPLayer(channels + self.images + 1, widths[0], 3)
        down, up = u_shape(image_size, widths[0], widths, blocks)

        def block(stage: Stage, encoder: bool) -> Block:
            attention = stage.resample == "keep" and stage.size in attention_resolutions
            return Block(stage, embedding, dropout, attention, encoder)

        low = Stage("keep", widths[-1], widths[-1], down[-1].size)
        self.down = nn.ModuleList(block(stage, encoder=True) for stage in down)
        self.middle = nn.ModuleList(Block(low, embedding, dropout, attention, False) for attention in (True, False))
        self.up = nn.ModuleList(block(stage, encoder=False) for stage in up)
        self.head = MPLayer(widths[0], channels, 3)
        self.gain = nn.Parameter(torch.zeros(1))

    def body(self, x: Tensor, level: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Apply the U-Net: F of the parametrisation, or v / data_std."""
        embedding = self.embedding(level, s, t, label)
        x = self.with_image(x, label)
        ones = x.new_ones(x.shape[0], 1, *x.shape[2:])  # acts as a bias
        x = self.stem(torch.cat([x, ones], dim=1))
        skips = [x]
        for block in self.down:
            x = run(self, block, x, embedding)
            skips.append(x)
        for block in self.middle:
            x = run(self, block, x, embedding)
        for block in self.up:
            if block.resample == "keep":
                x = mp_cat(x, skips.pop())
            x = run(self, block, x, embedding)
        out: Tensor = self.head(x, self.gain)
        return out
