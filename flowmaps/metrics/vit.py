"""The vision transformers of DINOv2 and CLIP, from the files of weights that their authors published."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmaps.errors import UserError


@dataclass(frozen=True)
class Transformer:
    """The sizes of a network, and which of the two families it is of.

    CLIP (arXiv 2103.00020) normalises the tokens first, has an approximate GELU and projects the class token. DINOv2
    (arXiv 2304.07193) scales the branches. Its positions were learnt at 518 pixels, and are resized to those of 224.
    """

    width: int
    depth: int
    patch: int
    stored_side: int  # positions in the file, along one side
    pixels: int = 224
    projection: int = 0  # features of CLIP

    @property
    def features(self) -> int:
        """The number of features."""
        return self.projection or self.width


class Block(nn.Module):
    """x + scale1 attention(norm1 x), then x + scale2 mlp(norm2 x), of tokens [n, length, width]."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        width, clip = sizes.width, bool(sizes.projection)
        eps = 1e-5 if clip else 1e-6
        self.heads, self.clip = width // 64, clip
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if not clip:
            self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))
        x = x + (attended if self.clip else self.scale1 * attended)
        hidden = self.fc1(self.norm2(x))
        hidden = self.fc2(hidden * torch.sigmoid(1.702 * hidden) if self.clip else F.gelu(hidden))
        result: Tensor = x + (hidden if self.clip else self.scale2 * hidden)
        return result


class ViT(nn.Module):
    """Normalised images [n, 3, pixels, pixels] to features [n, features]: the class token of the last block."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        width, clip = sizes.width, bool(sizes.projection)
        self.embed = nn.Conv2d(3, width, sizes.patch, stride=sizes.patch, bias=not clip)
        self.token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros((sizes.pixels // sizes.patch) ** 2 + 1, width))
        self.before = nn.LayerNorm(width) if clip else nn.Identity()
        self.blocks = nn.Sequential(*[Block(sizes) for _ in range(sizes.depth)])
        self.after = nn.LayerNorm(width, 1e-5 if clip else 1e-6)
        self.projection = nn.Linear(width, sizes.projection, bias=False) if clip else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), 1, -1), patches], dim=1) + self.positions
        features: Tensor = self.projection(self.after(self.blocks(self.before(tokens))[:, 0]))
        return features


# Names in the published files -> names here.
DINOV2_NAMES = {
    r"cls_token": "token",
    r"pos_embed": "positions",
    r"patch_embed\.proj\.": "embed.",
    r"attn\.qkv\.": "qkv.",
    r"attn\.proj\.": "out.",
    r"ls(\d)\.gamma": r"scale\1",
    r"mlp\.": "",
    r"^norm\.": "after.",
}
CLIP_NAMES = {
    r"^visual\.": "",
    r"class_embedding": "token",
    r"positional_embedding": "positions",
    r"conv1\.": "embed.",
    r"transformer\.resblocks\.": "blocks.",
    r"ln_pre\.": "before.",
    r"ln_post\.": "after.",
    r"ln_(\d)\.": r"norm\1.",
    r"attn\.in_proj_": "qkv.",
    r"attn\.out_proj\.": "out.",
    r"mlp\.c_fc\.": "fc1.",
    r"mlp\.c_proj\.": "fc2.",
    r"^proj$": "projection.weight",
}


def build(sizes: Transformer, published: Mapping[str, Tensor]) -> ViT:
    """Return the network with the weights of a published file, in float32 and eval mode.

    Args:
        sizes: Its sizes.
        published: The state dict of DINOv2, or of CLIP, whose text part is left out.

    Raises:
        UserError: A weight is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        network = ViT(sizes)
    clip = bool(sizes.projection)
    found = {}
    for name, tensor in published.items():
        if name != "mask_token" and (name.startswith("visual.") or not clip):
            for pattern, new in (CLIP_NAMES if clip else DINOV2_NAMES).items():
                name = re.sub(pattern, new, name)
            found[name] = tensor.float()
    stored = {**network.state_dict(), "positions": torch.empty(sizes.stored_side**2 + 1, sizes.width, device="meta")}
    if clip:  # transposed, as CLIP multiplies by it
        stored["projection.weight"] = stored["projection.weight"].T
    else:
        found |= {name: found[name].flatten(0, -2) for name in ("token", "positions") if name in found}
        found |= {"token": found["token"][0]} if "token" in found else {}
    for name in sorted(stored.keys() | found.keys()):
        expected, given = (tuple(of[name].shape) if name in of else None for of in (stored, found))
        if expected != given:
            raise UserError(f"{name} is {given or 'missing'}, expected {expected or 'none of this name'}")
    if clip:
        found["projection.weight"] = found["projection.weight"].T.contiguous()
    found["positions"] = resized(found["positions"], sizes.pixels // sizes.patch)
    network.to_empty(device="cpu").load_state_dict(found)
    return network.eval().requires_grad_(False)


def resized(positions: Tensor, side: int) -> Tensor:
    """Return positions [1 + stored^2, width] at ``side`` places along a side, as DINOv2 does: bicubic, offset 0.1.

    Its code scales by (side + 0.1) / stored, which moves the points where the curves are read.
    """
    stored = round((len(positions) - 1) ** 0.5)
    if stored == side:
        return positions
    grid = positions[1:].T.reshape(1, -1, stored, stored)
    scale = ((side + 0.1) / stored,) * 2
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])
