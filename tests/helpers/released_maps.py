"""Published flow maps as their authors store them, at a small size, and their evaluation from the papers' formulas.

Theirs count time from data to noise: T = 1 - s is the start, R = 1 - t the end of a jump.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from einops import rearrange

from helpers.released_state_dicts import Transformer

SECOND = {
    "soflow": ("s_embedder",),
    "meanflow_sit": ("r_embedder",),
    "dmf": (),
    "tvm": ("s_embedder", "guidance_embedder"),
}


class Map:
    """Weights ``w`` under the published names, and v(x, s, t, label); ``classes`` stands for no label."""

    def __init__(
        self, form, size=8, patch=2, width=128, depth=3, heads=2, classes=5, blocks=2, qk_norm=False, scale=1.0
    ):
        self.form, self.size, self.patch, self.width, self.depth, self.heads = form, size, patch, width, depth, heads
        self.blocks, self.scale, self.qk_norm, self.classes = blocks, scale, qk_norm or form == "tvm", classes
        g = torch.Generator().manual_seed(4)
        shapes = {"x_embedder.proj": (width, 4, patch, patch)}
        for name in ("t_embedder", *SECOND[form]):
            shapes |= {f"{name}.mlp.0": (width, 256), f"{name}.mlp.2": (width, width)}
        for i in range(depth):
            shapes |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
            shapes |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
            shapes |= {f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}
        shapes |= {"final_layer.linear": (4 * patch**2, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
        places = Transformer(size, 4, patch, width, 1, 0).w["pos_embed"]
        w = {"pos_embed": places, "y_embedder.embedding_table.weight": torch.randn(classes + 1, width, generator=g)}
        for name, shape in shapes.items():
            w[f"{name}.weight"] = torch.randn(shape, generator=g) / math.prod(shape[1:]) ** 0.5
            w[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
        if self.qk_norm:
            key = "weight" if form == "tvm" else "scale"
            for i, part in ((i, part) for i in range(depth) for part in "qk"):
                w[f"blocks.{i}.attn.{part}_norm.{key}"] = 1 + 0.2 * torch.randn(width // heads, generator=g)
        if form == "dmf":
            w |= {"logvar_linear.weight": torch.zeros(1, 256), "logvar_linear.bias": torch.zeros(1)}
        self.w = w

    def __call__(self, x, s, t, label):
        w = {name: tensor.to(x.dtype) for name, tensor in self.w.items()}

        def linear(name, x):
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def emb(name, value):
            phase = torch.stack([value * 10000 ** (-k / 128) for k in range(128)], dim=1)
            features = torch.cat([phase.cos(), phase.sin()], dim=1)
            return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", features)))

        def rms(y):
            return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        def norm(y):
            return rms(y) if self.form == "tvm" else rms_of_centred(y)

        def rms_of_centred(y):
            y = y - y.mean(-1, keepdim=True)
            return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        def modulation(name, c, count):
            parts = linear(name, F.silu(c))[:, None].chunk(count, -1)
            return [rms(part) for part in parts] if self.form == "tvm" else parts

        guided, table = label != self.classes, w["y_embedder.embedding_table.weight"][label]
        weight = torch.where(guided, self.scale, 1.0).to(x.dtype)
        first = last = emb("t_embedder", 1 - s) + table
        if self.form == "dmf":
            last = emb("t_embedder", 1 - t) + table
        else:
            first = last = first + emb(SECOND[self.form][0], t - s)
        if self.form == "tvm":
            first = last = first + emb("guidance_embedder", 1 / weight)
        p, n = self.patch, self.size // self.patch
        h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2)
        h = h + w["pos_embed"]
        for i in range(self.depth):
            c = first if i < self.blocks else last
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(f"blocks.{i}.adaLN_modulation.1", c, 6)
            qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1)
            q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
            if self.qk_norm:
                key = "weight" if self.form == "tvm" else "scale"
                q, k = (rms(y) * w[f"blocks.{i}.attn.{part}_norm.{key}"] for y, part in ((q, "q"), (k, "k")))
            y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            h = h + gate1 * linear(f"blocks.{i}.attn.proj", rearrange(y, "b heads n d -> b n (heads d)"))
            y = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
            h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", y)
        shift, scale = modulation("final_layer.adaLN_modulation.1", last, 2)
        y = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        y = rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=n, p=p, q=p)
        return -weight[:, None, None, None] * y if self.form == "tvm" else -y

    def save(self, path, training=False):
        """Write the file as published; ``training``: of MeanFlow SiT, that of a run."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in self.w.items()}
        if self.form == "soflow":
            average, model = ({f"network.{k}": v for k, v in part.items()} for part in (self.w, zeros))
            content = {"model": model, "ema_model": average, "optimizer": {"state": {}, "param_groups": []}}
            content |= {"finished_steps": 3, "finished_epochs": 1}
        elif training:
            args = argparse.Namespace(model="SiT-B/4", num_classes=self.classes, path_type="linear")
            content = {"model": zeros, "ema": self.w, "opt": {"state": {}}, "args": args, "steps": 3}
        else:
            content = self.w
        torch.save(content, path)
        return path
