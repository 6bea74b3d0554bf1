"""Networks published as state dicts, as in ``released``: DiT, SiT and rectified flow's DDPM++."""

import math

import torch
import torch.nn.functional as F

from helpers.released import levels

# DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740)


class Transformer:
    """A state dict under the names of facebookresearch's code, and its evaluation."""

    def __init__(self, size=8, channels=4, patch=2, width=128, depth=2, classes=5, heads=None):
        self.heads = heads or width // 64
        self.size, self.channels, self.patch, self.width, self.depth = size, channels, patch, width, depth
        g, n = torch.Generator().manual_seed(0), size // patch
        shapes = {
            "x_embedder.proj": (width, channels, patch, patch),
            "t_embedder.mlp.0": (width, 256),
            "t_embedder.mlp.2": (width, width),
            **{
                f"blocks.{i}.{name}": (rows * width, columns * width)
                for i in range(depth)
                for name, rows, columns in (
                    ("attn.qkv", 3, 1),
                    ("attn.proj", 1, 1),
                    ("mlp.fc1", 4, 1),
                    ("mlp.fc2", 1, 4),
                    ("adaLN_modulation.1", 6, 1),
                )
            },
            "final_layer.linear": (patch * patch * 2 * channels, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
        }
        w = {"pos_embed": self.places(n)[None]}
        for name, shape in shapes.items():
            w[f"{name}.weight"] = torch.randn(shape, generator=g) / math.prod(shape[1:]) ** 0.5
            w[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
        w["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=g)
        self.w = w

    def places(self, n):
        omega = 10000 ** (-torch.arange(self.width // 4, dtype=torch.float64) / (self.width // 4))
        rows = [
            torch.cat([f(p * omega) for p in (column, row) for f in (torch.sin, torch.cos)])
            for row in range(n)
            for column in range(n)
        ]
        return torch.stack(rows).float()

    def __call__(self, x, time, label):
        w = {name: tensor.to(x.dtype) for name, tensor in self.w.items()}

        def linear(name, x):
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def norm(x):
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

        b, p, n, heads = len(x), self.patch, self.size // self.patch, self.heads
        phase = torch.stack([time * 10000 ** (-k / 128) for k in range(128)], dim=1)
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], dim=1))))
        c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
        h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2)
        h = h + w["pos_embed"]
        for i in range(self.depth):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(
                6, -1
            )
            qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1).reshape(
                b, n * n, 3, heads, self.width // heads
            )
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n * n, -1)
            h = h + gate1 * linear(f"blocks.{i}.attn.proj", y)
            y = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
            h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", y)
        shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
        y = linear("final_layer.linear", norm(h) * (1 + scale) + shift)  # both prediction and variance
        y = y.reshape(b, n, n, p, p, 2 * self.channels)
        image = x.new_empty(b, self.channels, self.size, self.size)
        for i in range(n):
            for j in range(n):
                patch = y[:, i, j, :, :, : self.channels].movedim(-1, 1)
                image[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = patch
        return image


# DDPM++ in the code of Song et al. 2021, as rectified flow's checkpoints have it


class NCSNpp:
    """A state dict under the names of that code, and its evaluation."""

    def __init__(self, size=32, channels=3, width=16, mult=(1, 2), blocks=2, attention=(16,)):
        self.size, self.mult, self.blocks, self.attention, self.width = size, mult, blocks, attention, width
        self.g, self.w, self.count = torch.Generator().manual_seed(0), {}, 0
        self.dense(width, 4 * width)
        self.dense(4 * width, 4 * width)
        self.conv(channels, width)
        now, skips = width, [width]
        for level, res in levels(size, len(mult)):
            for _ in range(blocks):
                self.block(now, now := width * mult[level])
                if res in attention:
                    self.attend(now)
                skips.append(now)
            if level < len(mult) - 1:
                self.block(now, now, change=True)
                skips.append(now)
        self.block(now, now)
        self.attend(now)
        self.block(now, now)
        for level, res in reversed(levels(size, len(mult))):
            for _ in range(blocks + 1):
                self.block(now + skips.pop(), now := width * mult[level])
            if res in attention:
                self.attend(now)
            if level:
                self.block(now, now, change=True)
        self.group("", now)
        self.count += 1
        self.conv(now, channels)

    def put(self, name, *shape, one=False):
        scale = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        value = scale * torch.randn(shape, generator=self.g) + one
        self.w[f"all_modules.{self.count}.{name}"] = value

    def dense(self, inputs, outputs):
        self.put("weight", outputs, inputs)
        self.put("bias", outputs)
        self.count += 1

    def conv(self, inputs, outputs):
        self.put("weight", outputs, inputs, 3, 3)
        self.put("bias", outputs)
        self.count += 1

    def group(self, name, channels):
        self.put(f"{name}weight", channels, one=True)
        self.put(f"{name}bias", channels)

    def block(self, inputs, outputs, change=False):
        self.group("GroupNorm_0.", inputs)
        self.put("Conv_0.weight", outputs, inputs, 3, 3)
        self.put("Conv_0.bias", outputs)
        self.put("Dense_0.weight", outputs, 4 * self.width)
        self.put("Dense_0.bias", outputs)
        self.group("GroupNorm_1.", outputs)
        self.put("Conv_1.weight", outputs, outputs, 3, 3)
        self.put("Conv_1.bias", outputs)
        if change or inputs != outputs:
            self.put("Conv_2.weight", outputs, inputs, 1, 1)
            self.put("Conv_2.bias", outputs)
        self.count += 1

    def attend(self, channels):
        self.group("GroupNorm_0.", channels)
        for i in range(4):
            self.put(f"NIN_{i}.W", channels, channels)
            self.put(f"NIN_{i}.b", channels)
        self.count += 1

    def __call__(self, x, time):
        """The answer at ``time``, 0 .. 999."""
        w = {name: tensor.to(x.dtype) for name, tensor in self.w.items()}
        place = iter(range(self.count))

        def norm(name, x):
            y = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
            return y.reshape(x.shape) * w[f"{name}weight"][:, None, None] + w[f"{name}bias"][:, None, None]

        def plain(x):
            weight, bias = (w[f"all_modules.{i}.{part}"] for i in [next(place)] for part in ("weight", "bias"))
            return x @ weight.T + bias if weight.ndim == 2 else F.conv2d(x, weight, bias, padding=1)

        def block(x, change=lambda x: x):
            m = f"all_modules.{next(place)}."
            y = F.conv2d(
                change(F.silu(norm(f"{m}GroupNorm_0.", x))), w[f"{m}Conv_0.weight"], w[f"{m}Conv_0.bias"], padding=1
            )
            y = y + (F.silu(temb) @ w[f"{m}Dense_0.weight"].T + w[f"{m}Dense_0.bias"])[:, :, None, None]
            y = F.conv2d(F.silu(norm(f"{m}GroupNorm_1.", y)), w[f"{m}Conv_1.weight"], w[f"{m}Conv_1.bias"], padding=1)
            x = change(x)
            if f"{m}Conv_2.weight" in w:
                x = F.conv2d(x, w[f"{m}Conv_2.weight"], w[f"{m}Conv_2.bias"])
            return (x + y) / math.sqrt(2)

        def attend(x):
            m = f"all_modules.{next(place)}."
            y = norm(f"{m}GroupNorm_0.", x).flatten(2).transpose(1, 2)
            q, k, v = (y @ w[f"{m}NIN_{i}.W"] + w[f"{m}NIN_{i}.b"] for i in range(3))
            y = (q @ k.mT / math.sqrt(x.shape[1])).softmax(-1) @ v @ w[f"{m}NIN_3.W"] + w[f"{m}NIN_3.b"]
            return (x + y.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)

        n = self.width // 2
        phase = torch.stack([time * 10000 ** (-k / (n - 1)) for k in range(n)], dim=1)
        temb = plain(F.silu(plain(torch.cat([phase.sin(), phase.cos()], dim=1))))
        skips = [x := plain(x)]
        for level, res in levels(self.size, len(self.mult)):
            for _ in range(self.blocks):
                x = block(x)
                skips.append(x := attend(x) if res in self.attention else x)
            if level < len(self.mult) - 1:
                skips.append(x := block(x, lambda x: F.avg_pool2d(x, 2)))
        x = block(attend(block(x)))
        for level, res in reversed(levels(self.size, len(self.mult))):
            for _ in range(self.blocks + 1):
                x = block(torch.cat([x, skips.pop()], dim=1))
            x = attend(x) if res in self.attention else x
            if level:
                x = block(x, lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return plain(F.silu(norm(f"all_modules.{next(place)}.", x)))

    def save(self, path):
        """A training checkpoint: the model under DataParallel's names with its buffer, its EMA as a bare list."""
        model = {"module.sigmas": torch.ones(1000)} | {f"module.{k}": torch.zeros_like(v) for k, v in self.w.items()}
        ema = {"decay": 0.999999, "num_updates": 3, "shadow_params": list(self.w.values())}
        torch.save({"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 3}, path)
