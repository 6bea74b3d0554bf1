"""Networks built as the published checkpoints have them: their attribute names, nesting and way of pickling, and an
independent evaluation from the papers' equations. What the importers read, and what their result must equal.
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


def dump(content, path, protocol=4, more=()):
    """Pickle under the modules' true names, as NVIDIA's code does; ``more`` classes are of other packages."""
    full = ["dnnlib.util", "torch_utils.persistence", *(cls.__module__ for cls in more)]
    names = {".".join(name.split(".")[: i + 1]) for name in full for i in range(name.count(".") + 1)}
    fakes = {name: types.ModuleType(name) for name in names - sys.modules.keys()}
    for cls in more:
        setattr(fakes[cls.__module__], cls.__name__, cls)
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


# EDM (arXiv 2206.00364, table 1, appendix F.6)


class Linear(Persistent):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Conv2d(Persistent):
    def __init__(self, inputs, outputs, kernel, up=False, down=False, ncsn=False, fused=False):
        super().__init__()
        self.up, self.down, self.fused_resample = up, down, fused
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        line = torch.tensor([1.0, 3.0, 3.0, 1.0] if ncsn else [1.0, 1.0])
        line = line / line.sum()
        self.register_buffer("resample_filter", line.outer(line)[None, None] if up or down else None)

    def resampled(self, x, padding):
        """Every channel alone, by the filter as it is written down."""
        b, c, h, w = x.shape
        x, kernel = x.reshape(b * c, 1, h, w), self.resample_filter.to(x.dtype)
        y = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding) if self.up else None
        y = F.conv2d(x, kernel, stride=2, padding=padding) if self.down else y
        return y.reshape(b, c, *y.shape[2:])

    def forward(self, x):
        if self.fused_resample:
            y = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2 + 1)
            return self.resampled(y, 0) + self.bias[:, None, None]
        if self.resample_filter is not None and self.resample_filter.numel() > 4:
            x = self.resampled(x, 1)
            return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
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


class FourierEmbedding(Persistent):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2, generator=torch.Generator().manual_seed(5)) * 2)

    def forward(self, level):
        phase = 2 * math.pi * level[:, None] * self.freqs
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(Persistent):
    def __init__(self, inputs, outputs, emb, adm, up=False, down=False, attention=False, ncsn=False):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.in_channels, self.out_channels, self.emb_channels, self.dropout = inputs, outputs, emb, 0.1
        self.num_heads = (outputs // 64 if adm else 1) if attention else 0
        self.skip_scale, self.adaptive_scale = (1 if adm else np.sqrt(0.5)), adm
        self.norm0 = GroupNorm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, up, down, ncsn)
        self.affine = Linear(emb, outputs * (2 if adm else 1))
        self.norm1, self.conv1 = GroupNorm(outputs, eps), Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            self.skip = Conv2d(inputs, outputs, 0 if adm and inputs == outputs else 1, up, down, ncsn)
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


def levels(size, count):
    return [(level, size >> level) for level in range(count)]


class _EDMUNet(Persistent):
    def __init__(self, size, channels, classes, augment, width, mult, blocks, attention):
        super().__init__()
        adm, emb, ncsn = self.adm, 4 * width, self.ncsn
        features = 2 * width if ncsn else width
        self.label_dropout, self.size = 0, size
        self._init_args, self._init_kwargs = (), EasyDict(img_resolution=size, model_channels=width)
        self.map_noise = FourierEmbedding(features) if ncsn else PositionalEmbedding(width, endpoint=not adm)
        self.map_label = (Linear(classes, emb, bias=False) if adm else Linear(classes, features)) if classes else None
        self.map_augment = Linear(augment, features, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = Linear(features, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, skips, again_channels = channels, [], channels
        for level, res in levels(size, len(mult)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"], now = Conv2d(now, width, 3), width
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(now, now, emb, adm, down=True, ncsn=ncsn)
                if ncsn:
                    again = Conv2d(again_channels, now, 3, down=True, ncsn=True, fused=True)
                    self.enc[f"{res}x{res}_aux_residual"], again_channels = again, now
            skips.append(now)
            for i in range(blocks):
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(
                    now, width * mult[level], emb, adm, attention=res in attention
                )
                skips.append(now := width * mult[level])
        for level, res in reversed(levels(size, len(mult))):
            if level == len(mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(now, now, emb, adm, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(now, now, emb, adm)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(now, now, emb, adm, up=True, ncsn=ncsn)
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
        emb, skips, again = F.silu(emb), [], x
        for name, block in self.enc.items():
            if "aux" in name:
                skips[-1] = x = again = (x + block(again)) / math.sqrt(2)
                continue
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                x = F.silu(block(x)) if name.endswith("norm") else block(x)
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else x


class SongUNet(_EDMUNet):
    adm, ncsn = False, False

    def __init__(self, *args, ncsn=False):
        self.__dict__["ncsn"] = ncsn
        super().__init__(*args)


class DhariwalUNet(_EDMUNet):
    adm, ncsn = True, False


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


def edm(variant, path, classes=5, augment=9, size=16, mult=(1, 2), blocks=2, attention=(8,)):
    """Write a snapshot; returns its denoiser."""
    cls = {"ddpm++": SongUNet, "ncsn++": SongUNet, "adm": DhariwalUNet}[variant]
    width = 64 if variant == "adm" else 16
    kind = {"ncsn": True} if variant == "ncsn++" else {}
    model = cls(size, 3, classes, augment, width, mult, blocks, attention, **kind)
    net = randomise(EDMPrecond(model, size, 3, classes), 0.08)
    dump(
        {"ema": net, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": EasyDict(path="x", use_labels=True)}, path
    )
    return net
