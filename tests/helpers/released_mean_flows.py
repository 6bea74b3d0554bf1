"""Improved and pixel MeanFlow as their authors store them, at a small size, and their evaluation by the formulas.

Theirs count time from data to noise: T = 1 - s is the start, R = 1 - t the end of a jump, and guidance applies at
T_min <= T <= T_max.
"""

import math

import torch
import torch.nn.functional as F

TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
EMBEDDERS = {"omega": "omega_embedder", "t_min": "cfg_t_start_embedder", "t_max": "cfg_t_end_embedder"}
EMBEDDERS["time"] = "h_embedder"


class MeanFlow:
    """Weights ``w`` under the published names, and v(x, s, t, label, (w, low, high)); ``classes``: no label."""

    def __init__(self, form, size=8, patch=2, width=32, shared=2, head=2, heads=2, classes=5, hidden=88, bottleneck=6):
        self.form, self.size, self.patch, self.width, self.heads = form, size, patch, width, heads
        self.channels, self.classes, self.shared, self.head = (4 if form == "imf" else 3), classes, shared, head
        g, d = torch.Generator().manual_seed(4), width
        pixels = patch**2 * self.channels
        linears = {f"{name}.mlp.0": (d, 256) for name in EMBEDDERS.values()}
        linears |= {f"{name}.mlp.2": (d, d) for name in EMBEDDERS.values()}
        bare, ones = dict[str, tuple[int, ...]](), []
        for block in [f"shared_blocks.{i}" for i in range(shared)] + [f"u_heads.{i}" for i in range(head)]:
            bare |= {f"{block}.attn.{part}_proj": (d, d) for part in ("q", "k", "v", "out")}
            bare |= {f"{block}.mlp.w1": (hidden, d), f"{block}.mlp.w3": (hidden, d), f"{block}.mlp.w2": (d, hidden)}
            ones += [(f"{block}.{part}", d) for part in ("attn_scale", "mlp_scale", "norm1.weight", "norm2.weight")]
            ones += [(f"{block}.attn.{part}_norm.weight", d // heads) for part in "qk"]
        for last in ("u_final_layer", "v_final_layer"):
            linears[f"{last}.linear"] = (pixels, d)
            ones.append((f"{last}.norm.weight", d))
        w = {f"{name}_tokens": torch.randn(n, d, generator=g) for name, n in TOKENS.items()}
        w["y_embedder.embedding_table._flax_embedding.weight"] = torch.randn(classes + 1, d, generator=g)
        for name, shape in {**linears, **bare}.items():
            w[f"{name}._flax_linear.weight"] = torch.randn(shape, generator=g) / shape[1] ** 0.5
            if name in linears:
                w[f"{name}._flax_linear.bias"] = 0.1 * torch.randn(shape[0], generator=g)
        w |= {name: 0.6 + 0.2 * torch.randn(n, generator=g) for name, n in ones}
        kernels = {"proj": (d, self.channels, patch, patch)}
        if form == "pmf":
            kernels = {"proj1": (bottleneck, self.channels, patch, patch), "proj2": (d, bottleneck, 1, 1)}
            w = {name: tensor[None] if name.endswith("_tokens") else tensor for name, tensor in w.items()}
            w["pos_embed"] = torch.randn(1, 20 + (size // patch) ** 2, d, generator=g)
            w["rope_freqs"] = torch.ones((size // patch) ** 2, d // heads // 2, dtype=torch.complex64)
        for name, shape in kernels.items():
            w[f"x_embedder.{name}.weight"] = torch.randn(shape, generator=g) / math.prod(shape[1:]) ** 0.5
            w[f"x_embedder.{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
        self.w = {f"net.{name}": tensor for name, tensor in w.items()}

    def __call__(self, x, s, t, label, told=(1.0, 0.0, 1.0)):
        w = {name.removeprefix("net."): tensor.to(x.dtype) for name, tensor in self.w.items() if "rope" not in name}
        weight, low, high = (torch.as_tensor(value, dtype=x.dtype).expand(len(x)) for value in told)

        def linear(name, y):
            y = y @ w[f"{name}._flax_linear.weight"].T
            return y + w[bias] if (bias := f"{name}._flax_linear.bias") in w else y

        def rms(name, y):
            return w[f"{name}.weight"] * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        def emb(name, value):
            phase = torch.stack([value * 10000 ** (-k / 128) for k in range(128)], dim=1)
            return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([phase.cos(), phase.sin()], 1))))

        n, d = self.size // self.patch, self.width // self.heads
        numbers = {"omega": 1 - 1 / weight, "t_min": 1 - high, "t_max": 1 - low, "time": t - s}
        vectors = {"class": w["y_embedder.embedding_table._flax_embedding.weight"][label]}
        vectors |= {name: emb(EMBEDDERS[name], value) for name, value in numbers.items()}
        h = [w[f"{name}_tokens"].reshape(count, -1) + vectors[name][:, None] for name, count in TOKENS.items()]
        y = x
        for name in ("proj",) if self.form == "imf" else ("proj1", "proj2"):
            kernel, bias = w[f"x_embedder.{name}.weight"], w[f"x_embedder.{name}.bias"]
            y = F.conv2d(y, kernel, bias, stride=kernel.shape[-1])
        h = torch.cat([*h, y.flatten(2).transpose(1, 2)], dim=1)
        if self.form == "imf":
            pairs = 10000.0 ** (-torch.arange(d // 2, dtype=x.dtype) * 2 / d)
            angle = torch.arange(h.shape[1], dtype=x.dtype)[:, None] * pairs
        else:
            h = h + w["pos_embed"]
            pairs = 10000.0 ** (-torch.arange(d // 4, dtype=x.dtype) * 2 / (d / 2))
            row, column = torch.arange(n * n) // n, torch.arange(n * n) % n
            turned = torch.cat([row[:, None] * pairs, column[:, None] * pairs], dim=1)
            angle = torch.cat([torch.zeros(20, d // 2, dtype=x.dtype), turned])
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotated(y):
            pair = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pair * turn).flatten(-2)

        def split(y):
            return y.unflatten(-1, (self.heads, d)).transpose(1, 2)

        for block in [f"shared_blocks.{i}" for i in range(self.shared)] + [f"u_heads.{i}" for i in range(self.head)]:
            y = rms(f"{block}.norm1", h)
            q, k, v = (split(linear(f"{block}.attn.{part}_proj", y)) for part in "qkv")
            q, k = rotated(rms(f"{block}.attn.q_norm", q)), rotated(rms(f"{block}.attn.k_norm", k))
            y = ((q @ k.mT / d**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            h = h + w[f"{block}.attn_scale"] * linear(f"{block}.attn.out_proj", y)
            y = rms(f"{block}.norm2", h)
            y = F.silu(linear(f"{block}.mlp.w1", y)) * linear(f"{block}.mlp.w3", y)
            h = h + w[f"{block}.mlp_scale"] * linear(f"{block}.mlp.w2", y)
        y = linear("u_final_layer.linear", rms("u_final_layer.norm", h[:, 20:]))
        y = y.reshape(len(x), n, n, self.patch, self.patch, self.channels)
        y = y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        if self.form == "imf":
            return -y
        return (y - x) / (1 - s).clamp(min=0.05)[:, None, None, None]

    def save(self, path):
        torch.save(self.w, path)
        return path
