"""The transformer of improved MeanFlow: conditions are tokens, and a second head learns the drift."""

import copy
from collections.abc import Iterable
from typing import Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flowmaps.networks.conditioning import check_guidance, split_label, time_features
from flowmaps.networks.conditions import Conditioned, ConditionEmbedding, condition_rows, label_size
from flowmaps.networks.interface import registered
from flowmaps.networks.layers import check_sizes, run, without_tangent, zero
from flowmaps.networks.rotary import (
    FEATURES,
    ConditionTokens,
    PlainBlock,
    RMSNorm,
    Table,
    grid_turns,
    number_mlp,
    sequence_turns,
)
from samplers.callables import expand

LAST = 10000.0 ** -(127 / 128)  # lowest frequency of the features of a number
NEAREST = 0.05  # least 1 - s by which the difference to predicted data is divided
PREFIX = {"classes": 8, "condition": 8, "guidance": 4, "high": 2, "low": 2, "gap": 4}  # tokens of each, in this order


class IMFDiT(Conditioned, ModelMixin, ConfigMixin):
    """v(x, s, t, label) for x [B, channels, image_size, image_size]: a transformer over patches and conditions.

    Geng et al. 2025 (arXiv 2512.02012), improved MeanFlow. The class (8 tokens), with ``guidance`` its weight (4), with
    ``guidance_interval`` its times (2 each), and the gap t - s (4) come before the patches; s itself is not told.
    Attention normalises queries and keys and rotates them by the position in the sequence; SwiGLU; RMSNorm; no
    modulation. The last ``head_depth`` of ``depth`` blocks are the head of v. With ``second_head`` as many others,
    behind the same trunk, give a second velocity, which ``improved_mean_flow`` trains as the drift: see ``pair`` and
    ``second``. Exports are without it (``for_sampling``). A fresh network gives 0.

    ``prediction="data"``, ``bottleneck`` and ``rotation="grid"`` make it the network of pixel MeanFlow (arXiv
    2601.22158): the heads give an image F(x, s, t), and v = (F - x) / max(1 - s, 0.05), so that X_{0,1}(x) = F.

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
        prediction: What the heads give: "velocity", or "data".
        bottleneck: Channels between two linear layers that embed a patch, 0 for one layer.
        rotation: "sequence" rotates every token by its position; "grid" patches alone, by row and column, and adds a
            learned table of positions to all tokens.
        condition: The shape of a condition in place of a class: a vector (dim,), which has 8 tokens, tokens (n, dim),
            or an image (channels, image_size, image_size), concatenated to x. Empty for none.

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
        prediction: str = "velocity",
        bottleneck: int = 0,
        rotation: str = "sequence",
        condition: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        check_sizes(self.config)
        self.conditioned(self.config, tokens=True)
        self.label_size = label_size(num_classes, condition)
        check_guidance(self.label_size, guidance, guidance_interval)
        if not head_depth <= depth:
            raise ValueError(f"head_depth ({head_depth}) must not be above depth ({depth})")
        if image_size // patch > 1024:
            raise ValueError("patch must give at most 1024 patches per side")
        if image_size % patch or width % (2 * heads):
            raise ValueError(
                f"image_size ({image_size}) must be divisible by patch ({patch}), width ({width}) by twice the heads "
                f"({heads})"
            )
        for name, value, known in (
            ("prediction", prediction, ("velocity", "data")),
            ("rotation", rotation, ("sequence", "grid")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value}")
        if rotation == "grid" and width % (4 * heads):
            raise ValueError(f"rotation=grid needs width ({width}) divisible by four times the heads ({heads})")
        if not 0 < data_std < float("inf"):
            raise ValueError(f"data_std must be positive, got {data_std}")
        self.patch, self.size, self.data_std = patch, image_size // patch, data_std
        self.guidance, self.interval = guidance, guidance_interval
        self.data, self.gradient_checkpointing = prediction == "data", False
        hidden = hidden or 8 * width // 3
        self.prefix = nn.ModuleDict()
        if num_classes:
            self.prefix["classes"] = ConditionTokens(PREFIX["classes"], width, Table(num_classes + 1, width))
        if self.condition and not self.images:
            count = condition[0] if len(condition) == 2 else PREFIX["condition"]
            self.prefix["condition"] = ConditionTokens(count, width, ConditionEmbedding(condition, width))
        told = {"guidance": guidance, "high": guidance_interval, "low": guidance_interval, "gap": True}
        for name in (name for name, used in told.items() if used):
            self.prefix[name] = ConditionTokens(PREFIX[name], width, number_mlp(width))
        before = sum(len(cast(ConditionTokens, part).tokens) for part in self.prefix.values())
        tokens, size = before + self.size**2, width // heads
        turned = grid_turns(before, self.size, size) if rotation == "grid" else sequence_turns(tokens, size)
        self.register_buffer("turned", turned, persistent=False)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width)) if rotation == "grid" else None
        pixels = channels * patch**2
        first = nn.Conv2d(channels + self.images, bottleneck or width, patch, stride=patch)
        self.stem = nn.Sequential(first, nn.Conv2d(bottleneck, width, 1)) if bottleneck else nn.Sequential(first)

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
        for layer in cast(Iterable[nn.Conv2d], self.stem):
            nn.init.xavier_uniform_(layer.weight.data.flatten(1))
            nn.init.zeros_(cast(Tensor, layer.bias))

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
        label = condition_rows(label, self.condition)
        given = split_label(label, s, self.label_size, 0, self.guidance, self.interval)
        numbers = {
            "guidance": 1 - 1 / given.guidance,
            "high": 1 - given.high,
            "low": 1 - given.low,
            "gap": t - s,
        }
        told = {name: time_features(number, FEATURES, LAST) for name, number in numbers.items()}
        told["classes"] = told["condition"] = given.rows
        patches = self.stem(self.with_image(x / self.data_std, label)).flatten(2).mT
        tokens = [part(told[name]).to(patches.dtype) for name, part in self.prefix.items()]
        sequence = torch.cat([*tokens, patches], dim=1)
        if self.positions is not None:
            sequence = sequence + self.positions.to(sequence.dtype)
        return self.through(sequence, self.blocks)

    def through(self, tokens: Tensor, blocks: nn.ModuleList) -> Tensor:
        """Apply ``blocks`` to tokens [B, n, width]."""
        for block in blocks:
            tokens = run(self, block, tokens, self.turned)
        return tokens

    def velocity(self, x: Tensor, s: Tensor, trunk: Tensor, blocks: nn.ModuleList, output: nn.Module) -> Tensor:
        """Return the velocity at (x, s) that one head makes of the tokens ``trunk``."""
        tokens = self.through(trunk, blocks)[:, -(self.size**2) :]
        p = self.patch
        out = rearrange(output(tokens), "b (h w) (p q c) -> b c (h p) (w q)", h=self.size, p=p, q=p)
        if self.data:
            v: Tensor = (self.data_std * out - x) / expand(1 - s, x).clamp(min=NEAREST).to(x.dtype)
        else:
            v = -self.data_std * out  # the authors' sign
        return v

    def for_sampling(self) -> Self:
        """Return a copy without the second head; the weights of a network on the meta device stay there."""
        made = copy.deepcopy(self)
        made.second_blocks = made.second_output = None
        made.register_to_config(second_head=False)
        return made
