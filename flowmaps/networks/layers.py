"""Layers shared by the networks, safe under torch.func.jvp and torch.compile.

Affine ``nn.GroupNorm``/``nn.LayerNorm`` stop torch.compile inside a jvp, and under autocast they pass a float32
tangent to the next half-precision layer. So normalise without weights, then scale and shift by hand in x's type.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flowmaps.errors import shorten
from flowmaps.info import MOST_CLASSES


@contextmanager
def no_dropout(network: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, whatever the mode of ``network``."""
    active = [m for m in network.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


class Dropout(nn.Dropout):
    """Dropout that can use one mask for two passes of the network, see ``shared_dropout``."""

    shared = False
    mask: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.shared and self.training):
            return super().forward(input)
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(input), self.p)
        return input * self.mask


@contextmanager
def shared_dropout(network: nn.Module) -> Iterator[None]:
    """Make all passes of ``network`` inside the block, on batches of one shape, drop the same activations."""
    layers = [m for m in network.modules() if isinstance(m, Dropout)]
    for layer in layers:
        layer.shared = True
    try:
        yield
    finally:
        for layer in layers:
            layer.shared, layer.mask = False, None


def without_tangent(x: Tensor) -> Tensor:
    """Return x without the tangent that it has inside a forward derivative; its graph stays."""
    primal: Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal


def zero(layer: nn.Module) -> nn.Module:
    """Set the weights of ``layer`` to zero, so that its branch starts at zero."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def own_type(x: Tensor) -> AbstractContextManager[None]:
    """Let operations inside the block keep the type of x, also those that CUDA's autocast runs in float32."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


def normalise(x: Tensor, eps: float = 1e-5, groups: int = 0) -> Tensor:
    """Normalise [B, C, H, W] without weights, in ``groups``; 0: up to 32 of at least 4 channels that divide C."""
    if groups:
        return group_norm(x, groups, eps)
    channels = x.shape[1]
    most = max(1, min(32, channels // 4))
    return group_norm(x, next(groups for groups in range(most, 0, -1) if channels % groups == 0), eps)


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise [B, n, C] along C without weights.

    This is one group of a group normalisation, since backward through the forward derivative of F.layer_norm is
    silently wrong (pytorch issue 196700; seen in 2.11 and 2.15).
    """
    return group_norm(x.flatten(0, 1), 1, eps).view_as(x)


def rms_norm(x: Tensor) -> Tensor:
    """Divide x by its root mean square along the last dimension."""
    with own_type(x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def group_norm(x: Tensor, groups: int, eps: float) -> Tensor:
    """Normalise [B, C, ...] in ``groups`` without weights, in the type of x; sums are in at least float32.

    F.group_norm calls the same kernel, but CUDA's autocast runs that in float32, and everything up to the next
    convolution or linear layer would be float32 too.
    """
    batch, channels, *pixels = x.shape
    normalised: Tensor = torch.native_group_norm(x, None, None, batch, channels, math.prod(pixels), groups, eps)[0]
    return normalised


class GroupNorm(nn.Module):
    """Group normalisation whose scale and shift are applied by hand, in the type of the activation."""

    def __init__(self, channels: int, eps: float = 1e-5, groups: int = 0) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.weight.to(x.dtype)[:, None, None], self.bias.to(x.dtype)[:, None, None]
        return torch.addcmul(shift, normalise(x, self.eps, self.groups), scale)


def heads_of(channels: int, head_channels: int) -> int:
    """Return the number of attention heads of ``head_channels`` each, or 1 if there are fewer channels."""
    if channels % min(channels, head_channels):
        raise ValueError(f"attention needs channels ({channels}) divisible by head_channels ({head_channels})")
    return max(1, channels // head_channels)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of [B, C, H, W], added to its input; the added part starts at zero."""

    def __init__(self, channels: int, head_channels: int = 64, eps: float = 1e-5, groups: int = 0) -> None:
        super().__init__()
        self.heads = heads_of(channels, head_channels)
        self.norm = GroupNorm(channels, eps, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(rearrange(y, "b heads (h w) c -> b (heads c) h w", h=h, w=w))
        return x + out


def smooth(x: Tensor, padding: int = 1) -> Tensor:
    """Weight neighbours of [B, C, H, W] by (1, 2, 1) / 4 in both directions, with zeros around it."""
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=padding), 2, stride=1)


def resample(x: Tensor, mode: str, smoothed: bool = False) -> Tensor:
    """Halve the resolution of [B, C, H, W] ("down": 2 x 2 means), double it ("up": nearest) or keep it ("keep").

    ``smoothed``, by ``smooth``, this is the filter (1, 3, 3, 1) of NCSN++.
    """
    if mode == "keep":
        return x
    if mode == "down":
        return F.avg_pool2d(smooth(x) if smoothed else x, 2)
    with own_type(x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return smooth(x) if smoothed else x


class Stage(NamedTuple):
    """Position in a U-Net: change of resolution, channels, and resolution; ``last`` of its level in the decoder."""

    resample: str  # keep, down or up
    inputs: int
    channels: int
    size: int
    last: bool = False


def u_shape(size: int, stem: int, widths: tuple[int, ...], blocks: int) -> tuple[list[Stage], list[Stage]]:
    """Lay out encoder and decoder of a U-Net whose first layer gives ``stem`` channels: ``blocks`` per level.

    Every stage of the encoder, and the first layer, passes its output to a "keep" stage of the decoder, last first.
    """
    down, up, skips, current = [], [], [stem], stem
    for level, channels in enumerate(widths):
        if level:
            size //= 2
            down.append(Stage("down", current, current, size))
            skips.append(current)
        for _ in range(blocks):
            down.append(Stage("keep", current, channels, size))
            skips.append(current := channels)
    for level, channels in reversed(list(enumerate(widths))):
        for i in range(blocks + 1):
            up.append(Stage("keep", current + skips.pop(), channels, size, last=i == blocks))
            current = channels
        if level:
            size *= 2
            up.append(Stage("up", current, current, size))
    return down, up


def run(network: Any, part: Callable[..., Any], *args: Any) -> Any:
    """Call ``part(*args)`` of ``network``; under its ``gradient_checkpointing``, recompute activations in the backward.

    The recomputation uses the dropout state of the forward pass, since the backward pass may run after the end of a
    ``no_dropout`` or ``shared_dropout`` block.
    """
    if not (getattr(network, "gradient_checkpointing", False) and torch.is_grad_enabled()):
        return part(*args)
    layers = [m for m in network.modules() if isinstance(m, Dropout)]

    def state() -> list[tuple[bool, bool, Tensor | None]]:
        return [(layer.training, layer.shared, layer.mask) for layer in layers]

    def restore(states: list[tuple[bool, bool, Tensor | None]]) -> None:
        for layer, (training, shared, mask) in zip(layers, states, strict=True):
            layer.training, layer.shared, layer.mask = training, shared, mask

    now = state()

    @contextmanager
    def as_now() -> Iterator[None]:
        later = state()
        restore(now)
        try:
            yield
        finally:
            restore(later)

    return checkpoint(part, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now()))


def run_whole(network: Any, part: Callable[..., Any], *args: Any) -> Any:
    """Call ``part`` as ``run`` does, but recompute it as one piece: torch cannot recompute inside a derivative."""
    if not getattr(network, "gradient_checkpointing", False):
        return part(*args)

    def inside(*args: Any) -> Any:
        network.gradient_checkpointing = False
        try:
            return part(*args)
        finally:
            network.gradient_checkpointing = True

    return run(network, inside, *args)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse arguments ``config`` of a network that are out of range, before anything is allocated."""
    for names, least, most in (
        ("image_size patch", 1, 16_384),
        ("channels width dim", 1, 65_536),
        ("depth head_depth blocks heads", 1, 512),
        ("num_classes", 0, MOST_CLASSES),
        ("augment_dim fourier_features norm_groups head_channels decoupled hidden bottleneck", 0, 65_536),
    ):
        for name in names.split():
            if name in config and not (_whole(config[name]) and least <= config[name] <= most):
                raise ValueError(
                    f"{name}={shorten(repr(config[name]), 60)}: must be a whole number from {least} to {most}"
                )
    if not 0 <= config.get("dropout", 0) < 1:
        raise ValueError(f"dropout={config['dropout']}: must be in [0, 1)")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_unet(config: Mapping[str, Any]) -> None:
    """Refuse arguments ``config`` of a network that no U-Net can have."""
    check_sizes(config)
    image_size, mult, patch = config["image_size"], config["channel_mult"], config.get("patch", 1)
    if not 1 <= len(mult) <= 16 or not all(_whole(m) and 1 <= m <= 1024 for m in mult):
        raise ValueError(f"channel_mult={shorten(mult, 60)}: must be 1 to 16 whole numbers of at least 1")
    if config["width"] % 2:
        raise ValueError("width must be even")
    if image_size % (patch * 2 ** (len(mult) - 1)):
        raise ValueError(
            f"image_size {image_size} cannot be folded by patch={patch} and halved {len(mult) - 1} times: "
            "use fewer entries in channel_mult or another patch"
        )
    levels = [image_size // patch // 2**level for level in range(len(mult))]
    if unknown := [size for size in config["attention_resolutions"] if size not in levels]:
        raise ValueError(
            f"attention_resolutions has {shorten(unknown[0], 60)}, which is not the resolution of a level: "
            f"choose from {', '.join(map(str, levels))}, or leave it empty"
        )
