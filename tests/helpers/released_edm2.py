"""EDM2's networks, as in ``released``: arXiv 2312.02696, configuration G, appendix B."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from helpers.released import EasyDict, EDMPrecond, Persistent, dump, levels, randomise


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
        for level, res in levels(size, len(mult)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"], now = MPConv(now, width * mult[0], (3, 3)), width * mult[0]
            else:
                self.enc[f"{res}x{res}_down"] = Block(now, now, emb, "enc", "down")
            skips.append(now)
            for i in range(blocks):
                block = Block(now, width * mult[level], emb, "enc", attention=res in attention)
                self.enc[f"{res}x{res}_block{i}"] = block
                skips.append(now := width * mult[level])
        for level, res in reversed(levels(size, len(mult))):
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
