"""Networks built as the published checkpoints have them: their attribute names, nesting and way of pickling, and an
evaluation of our own writing from the papers' equations. What the importers read, and what their result must equal.
"""

import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class EasyDict(dict):
    """Stands for dnnlib's."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("source code in a checkpoint was about to run")


EasyDict.__module__, _reconstruct_persistent_obj.__module__ = "dnnlib.util", "torch_utils.persistence"


class Persistent(nn.Module):
    """Pickles as torch_utils.persistence does: a record of class name, its source and the state."""

    source = "raise SystemExit('this must never run')"

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": type(self).__name__}
        return (_reconstruct_persistent_obj, ({**meta, "state": dict(self.__dict__)},), None, None, None)


def dump(content, path, protocol=4):
    """Pickle under the modules' true names, as NVIDIA's code does."""
    fakes = {
        name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
    }
    fakes["dnnlib.util"].EasyDict = EasyDict
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules.update(fakes)
    try:
        path.write_bytes(pickle.dumps(content, protocol))
    finally:
        for name in fakes:
            del sys.modules[name]


def randomise(network, std=0.15):
    torch.manual_seed(3)
    for p in network.parameters():
        nn.init.normal_(p, std=std)
    return network.eval().requires_grad_(False)


# ---- EDM (arXiv 2206.00364, table 1, appendix F.6) ----


class Linear(Persistent):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Conv2d(Persistent):
    def __init__(self, inputs, outputs, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down, self.fused_resample = up, down, False
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(Persistent):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x):
        y = x.reshape(len(x), self.num_groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + self.eps).sqrt()
        return y.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


class PositionalEmbedding(Persistent):
    def __init__(self, channels, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = channels, 10000, endpoint

    def forward(self, level):
        n = self.num_channels // 2
        phase = torch.stack([level * 10000 ** (-k / (n - self.endpoint)) for k in range(n)], dim=1)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(Persistent):
    def __init__(self, inputs, outputs, emb, adm, up=False, down=False, attention=False):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.in_channels, self.out_channels, self.emb_channels, self.dropout = inputs, outputs, emb, 0.1
        self.num_heads = (outputs // 64 if adm else 1) if attention else 0
        self.skip_scale, self.adaptive_scale = (1 if adm else np.sqrt(0.5)), adm
        self.norm0 = GroupNorm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, up, down)
        self.affine = Linear(emb, outputs * (2 if adm else 1))
        self.norm1, self.conv1 = GroupNorm(outputs, eps), Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            self.skip = Conv2d(inputs, outputs, 0 if adm and inputs == outputs else 1, up, down)
        if self.num_heads:
            self.norm2 = GroupNorm(outputs, eps)
            self.qkv, self.proj = Conv2d(outputs, 3 * outputs, 1), Conv2d(outputs, outputs, 1)

    def forward(self, x, emb):
        y = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            y = F.silu(shift + self.norm1(y) * (scale + 1))
        else:
            y = F.silu(self.norm1(y + params))
        x = (self.conv1(y) + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            b, c, h, w = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b * self.num_heads, c // self.num_heads, 3, h * w).unbind(2)
            a = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])).softmax(dim=2)
            y = torch.einsum("nqk,nck->ncq", a, v).reshape(x.shape)
            x = (x + self.proj(y)) * self.skip_scale
        return x


def _levels(size, count):
    return [(level, size >> level) for level in range(count)]


class _EDMUNet(Persistent):
    def __init__(self, size, channels, classes, augment, width, mult, blocks, attention):
        super().__init__()
        adm, emb = self.adm, 4 * width
        self.label_dropout, self.size = 0, size
        self._init_args, self._init_kwargs = (), EasyDict(img_resolution=size, model_channels=width)
        self.map_noise = PositionalEmbedding(width, endpoint=not adm)
        self.map_label = (Linear(classes, emb, bias=False) if adm else Linear(classes, width)) if classes else None
        self.map_augment = Linear(augment, width, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = Linear(width, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, skips = channels, []
        for level, res in _levels(size, len(mult)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"], now = Conv2d(now, width, 3), width
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(now, now, emb, adm, down=True)
            skips.append(now)
            for i in range(blocks):
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(
                    now, width * mult[level], emb, adm, attention=res in attention
                )
                skips.append(now := width * mult[level])
        for level, res in reversed(_levels(size, len(mult))):
            if level == len(mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(now, now, emb, adm, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(now, now, emb, adm)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(now, now, emb, adm, up=True)
            for i in range(blocks + 1):
                attends = res in attention and (adm or i == blocks)
                block = UNetBlock(now + skips.pop(), width * mult[level], emb, adm, attention=attends)
                self.dec[f"{res}x{res}_block{i}"], now = block, width * mult[level]
        norm, conv = GroupNorm(now, 1e-5 if adm else 1e-6), Conv2d(now, channels, 3)
        if adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{size}x{size}_aux_norm"], self.dec[f"{size}x{size}_aux_conv"] = norm, conv

    def forward(self, x, level, classes, augment=None):
        emb = self.map_noise(level)
        if not self.adm:
            n = emb.shape[1] // 2
            emb = torch.cat([emb[:, n:], emb[:, :n]], dim=1)
            if self.map_label is not None:
                emb = emb + self.map_label(classes * math.sqrt(classes.shape[1]))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.adm and self.map_label is not None:
            emb = emb + self.map_label(classes)
        emb, skips = F.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                x = F.silu(block(x)) if name.endswith("norm") else block(x)
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else x


class SongUNet(_EDMUNet):
    adm = False


class DhariwalUNet(_EDMUNet):
    adm = True


class EDMPrecond(Persistent):
    def __init__(self, model, size, channels, classes):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = size, channels, classes, False
        self.sigma_min, self.sigma_max, self.sigma_data = 0, float("inf"), 0.5
        self.model = model

    def forward(self, y, sigma, classes, augment=None):
        """D(y; sigma) of the preconditioning in table 1."""
        s, d = sigma[:, None, None, None], self.sigma_data
        out = self.model(y / (s**2 + d**2).sqrt(), sigma.log() / 4, classes, augment)
        return d**2 / (s**2 + d**2) * y + s * d / (s**2 + d**2).sqrt() * out


def edm(variant, path, classes=5, augment=9):
    """Write a snapshot; returns its denoiser."""
    cls = {"ddpm++": SongUNet, "adm": DhariwalUNet}[variant]
    width = 64 if variant == "adm" else 16
    model = cls(16, 3, classes, augment, width, (1, 2), 2, (8,))
    net = randomise(EDMPrecond(model, 16, 3, classes), 0.08)
    dump(
        {"ema": net, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": EasyDict(path="x", use_labels=True)}, path
    )
    return net


# ---- EDM2 (arXiv 2312.02696, configuration G, appendix B) ----


def unit(x, dim):
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel()))


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


class MPConv(Persistent):
    def __init__(self, inputs, outputs, kernel=()):
        super().__init__()
        self.out_channels, self.weight = outputs, nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x, gain=1.0):
        w = unit(self.weight, tuple(range(1, self.weight.ndim))) * (gain / math.sqrt(self.weight[0].numel()))
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(Persistent):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, level):
        return (level[:, None] * self.freqs + self.phases).cos() * math.sqrt(2)


class Block(Persistent):
    def __init__(self, inputs, outputs, emb, flavor, mode="keep", attention=False):
        super().__init__()
        self.out_channels, self.flavor, self.resample_mode, self.dropout = outputs, flavor, mode, 0.1
        self.resample_filter, self.num_heads = [1, 1], outputs // 64 if attention else 0
        self.res_balance = self.attn_balance = 0.3
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outputs if flavor == "enc" else inputs, outputs, (3, 3))
        self.emb_linear, self.conv_res1 = MPConv(emb, outputs), MPConv(outputs, outputs, (3, 3))
        self.conv_skip = MPConv(inputs, outputs, (1, 1)) if inputs != outputs else None
        self.attn_qkv = MPConv(outputs, 3 * outputs, (1, 1)) if attention else None
        self.attn_proj = MPConv(outputs, outputs, (1, 1)) if attention else None

    def forward(self, x, emb):
        if self.resample_mode == "down":
            x = F.avg_pool2d(x, 2)
        if self.resample_mode == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.flavor == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(F.silu(x) / 0.596)
        y = y * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None]
        y = self.conv_res1(F.silu(y) / 0.596)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.num_heads:
            b, c, h, w = x.shape
            q, k, v = unit(self.attn_qkv(x).reshape(b, self.num_heads, -1, 3, h * w), 2).unbind(3)
            a = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(c // self.num_heads)).softmax(dim=3)
            y = self.attn_proj(torch.einsum("nhqk,nhck->nhcq", a, v).reshape(b, c, h, w))
            x = mp_sum(x, y, 0.3)
        return x.clip(-256, 256)


class UNet(Persistent):
    def __init__(self, size, channels, classes, width, mult, blocks, attention):
        super().__init__()
        emb, now, skips = width * max(mult), channels + 1, []
        self.label_balance = self.concat_balance = 0.5
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = MPFourier(width * mult[0]), MPConv(width * mult[0], emb)
        self.emb_label = MPConv(classes, emb) if classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for level, res in _levels(size, len(mult)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"], now = MPConv(now, width * mult[0], (3, 3)), width * mult[0]
            else:
                self.enc[f"{res}x{res}_down"] = Block(now, now, emb, "enc", "down")
            skips.append(now)
            for i in range(blocks):
                block = Block(now, width * mult[level], emb, "enc", attention=res in attention)
                self.enc[f"{res}x{res}_block{i}"] = block
                skips.append(now := width * mult[level])
        for level, res in reversed(_levels(size, len(mult))):
            if level == len(mult) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(now, now, emb, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = Block(now, now, emb, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = Block(now, now, emb, "dec", "up")
            for i in range(blocks + 1):
                block = Block(now + skips.pop(), width * mult[level], emb, "dec", attention=res in attention)
                self.dec[f"{res}x{res}_block{i}"], now = block, width * mult[level]
        self.out_conv = MPConv(now, channels, (3, 3))

    def forward(self, x, level, classes):
        emb = self.emb_noise(self.emb_fourier(level))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(classes * math.sqrt(classes.shape[1])), 0.5)
        emb, x, skips = F.silu(emb) / 0.596, torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                y = skips.pop()
                n, m = x.shape[1], y.shape[1]
                c = math.sqrt((n + m) / 0.5)
                x = torch.cat([x * (0.5 * c / math.sqrt(n)), y * (0.5 * c / math.sqrt(m))], dim=1)
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)


class Precond(EDMPrecond):
    def __init__(self, unet, size, channels, classes):
        Persistent.__init__(self)
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = size, channels, classes, True
        self.sigma_data = 0.5
        self.unet, self.logvar_fourier, self.logvar_linear = unet, MPFourier(128), MPConv(128, 1)

    @property
    def model(self):
        return lambda x, level, classes, augment: self.unet(x, level, classes)


class StabilityVAEEncoder:
    def __init__(self):
        self.vae_name, self.batch_size, self._vae = "stabilityai/sd-vae-ft-mse", 8, None
        self.scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
        self.bias = np.float32(0) - np.float32([5.81, 3.25, 0.12, -2.15]) * self.scale

    source, __reduce__ = Persistent.source, Persistent.__reduce__


def edm2(path, classes=5):
    """Write a snapshot in half precision, as published; returns its denoiser in float32."""
    net = randomise(Precond(UNet(16, 4, classes, 64, (1, 2), 1, (8,)), 16, 4, classes), 0.5).half()
    content = EasyDict(encoder=StabilityVAEEncoder(), dataset_kwargs=EasyDict(path="x"), loss_fn=None, ema=net)
    dump(content, path)
    return net.float()


# ---- DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740) ----


class Transformer:
    """A state dict under the names of facebookresearch's code, and its evaluation."""

    def __init__(self, size=8, channels=4, patch=2, width=128, depth=2, classes=5):
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

        b, p, n, heads = len(x), self.patch, self.size // self.patch, self.width // 64
        phase = torch.stack([time * 10000 ** (-k / 128) for k in range(128)], dim=1)
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], dim=1))))
        c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
        h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2)
        h = h + w["pos_embed"]
        for i in range(self.depth):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(
                6, -1
            )
            qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1).reshape(b, n * n, 3, heads, 64)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).reshape(b, n * n, -1)
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


# ---- DDPM++ in the code of Song et al. 2021, as rectified flow's checkpoints have it ----


class NCSNpp:
    """A state dict under the names of that code, and its evaluation."""

    def __init__(self, size=32, channels=3, width=16, mult=(1, 2), blocks=2, attention=(16,)):
        self.size, self.mult, self.blocks, self.attention, self.width = size, mult, blocks, attention, width
        self.g, self.w, self.count = torch.Generator().manual_seed(0), {}, 0
        self.dense(width, 4 * width)
        self.dense(4 * width, 4 * width)
        self.conv(channels, width)
        now, skips = width, [width]
        for level, res in _levels(size, len(mult)):
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
        for level, res in reversed(_levels(size, len(mult))):
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
        for level, res in _levels(self.size, len(self.mult)):
            for _ in range(self.blocks):
                x = block(x)
                skips.append(x := attend(x) if res in self.attention else x)
            if level < len(self.mult) - 1:
                skips.append(x := block(x, lambda x: F.avg_pool2d(x, 2)))
        x = block(attend(block(x)))
        for level, res in reversed(_levels(self.size, len(self.mult))):
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
