"""EDM2UNet and UNet against evaluations written down from the papers, on shared weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import randomised

from flowmaps.networks import EDM2UNet, UNet


class EDM2:
    """EDM2 (arXiv 2312.02696), configuration G, for times in [0, 1]: appendix B's equations, one weight at a time."""

    def __init__(self, weights, width, mult, blocks, attention, classes, size):
        self.w, self.width, self.mult, self.blocks = weights, width, mult, blocks
        self.attention, self.classes, self.size = attention, classes, size

    def layer(self, name, x, gain=1.0):
        w = self.w[f"{name}.weight"]
        norm = torch.linalg.vector_norm(w.flatten(1), dim=1).reshape(-1, *[1] * (w.ndim - 1))  # equation 66
        w = w / (norm + 1e-4 * math.sqrt(w[0].numel())) * gain
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    def pixel_norm(self, x, dim):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return x / (1e-4 + norm / math.sqrt(x.shape[dim]))

    def silu(self, x):
        return x * torch.sigmoid(x) / 0.596  # equation 81

    def sum(self, a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)  # equation 88

    def cat(self, a, b):  # equation 103
        t, n, m = 0.5, a.shape[1], b.shape[1]
        c = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
        return torch.cat([c * (1 - t) / math.sqrt(n) * a, c * t / math.sqrt(m) * b], dim=1)

    def features(self, t):
        n = self.width * self.mult[0] // 2
        phase = torch.stack([t * (1 / 10000) ** (k / n) for k in range(n)], dim=1)
        return torch.cat([torch.cos(phase), torch.sin(phase)], dim=1) * 2**0.5

    def embed(self, s, t, label):
        e = self.layer("embedding.start", self.features(s))
        if t is not None:  # Boffi et al. 2025: both times, by halves
            e = self.sum(e, self.layer("embedding.gap", self.features(t - s)), 0.5)
        if self.classes:
            one_hot = torch.eye(self.classes, dtype=s.dtype)[label] * math.sqrt(self.classes)
            e = self.sum(e, self.layer("embedding.label", one_hot), 0.5)
        return self.silu(e)

    def block(self, name, x, e, kind, attention):
        if f"{name}.skip.weight" in self.w and kind == "encoder":
            x = self.layer(f"{name}.skip", x)
        if kind == "encoder":
            x = self.pixel_norm(x, 1)
        y = self.layer(f"{name}.conv1", self.silu(x))
        c = self.layer(f"{name}.modulation", e, self.w[f"{name}.gain"]) + 1
        y = self.layer(f"{name}.conv2", self.silu(y * c[:, :, None, None]))
        if f"{name}.skip.weight" in self.w and kind == "decoder":
            x = self.layer(f"{name}.skip", x)
        x = self.sum(x, y, 0.3)
        if attention:
            b, c, h, w = x.shape
            heads = max(1, c // 64)
            y = self.layer(f"{name}.qkv", x).reshape(b, heads, c // heads, 3, h * w)
            q, k, v = self.pixel_norm(y, 2).unbind(3)
            a = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(c // heads)).softmax(dim=3)
            y = torch.einsum("bhqk,bhck->bhcq", a, v).reshape(b, c, h, w)
            x = self.sum(x, self.layer(f"{name}.out", y), 0.3)
        return torch.clip(x, -256, 256)

    def __call__(self, x, s, t, label, data_std=0.5):
        """Two times, or with ``t`` None the network of one time, as published."""
        e = self.embed(s, t, label)
        x = torch.cat([x / data_std, torch.ones_like(x[:, :1])], dim=1)
        x = self.layer("stem", x)
        skips, size, n = [x], self.size, 0
        for level in range(len(self.mult)):
            for i in range(self.blocks + (level > 0)):
                down = level > 0 and i == 0
                if down:
                    size //= 2
                    x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
                x = self.block(f"down.{n}", x, e, "encoder", size in self.attention and not down)
                skips.append(x)
                n += 1
        x = self.block("middle.0", x, e, "decoder", True)
        x = self.block("middle.1", x, e, "decoder", False)
        n = 0
        for level in reversed(range(len(self.mult))):
            if level < len(self.mult) - 1:
                size *= 2
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.block(f"up.{n}", x, e, "decoder", False)
                n += 1
            for _ in range(self.blocks + 1):
                x = self.block(f"up.{n}", self.cat(x, skips.pop()), e, "decoder", size in self.attention)
                n += 1
        assert not skips
        return data_std * self.layer("head", x, self.w["gain"])


@pytest.mark.parametrize("classes", [0, 5])
def test_edm2_unet_is_the_published_one(classes):
    shape = {"width": 32, "channel_mult": (1, 2, 4), "blocks": 2, "attention_resolutions": (8, 4)}
    network = randomised(EDM2UNet(image_size=16, channels=3, num_classes=classes, **shape))
    x, label = 0.5 * torch.randn(4, 3, 16, 16), torch.arange(4) if classes else None
    s, t = torch.rand(2, 4).sort(dim=0).values
    weights = dict(network.state_dict())
    paper = EDM2(weights, 32, (1, 2, 4), 2, (8, 4), classes, 16)
    with torch.no_grad():
        network.embedding.gains["gap"].fill_(1.0)
        two = network(x, s, t, label)
        network.embedding.gains["gap"].zero_()
        one = network(x, t, t, label)
    assert two.std() > 0.01
    for ours, theirs in ((two, paper(x, s, t, label)), (one, paper(x, t, None, label))):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class EDM:
    """The U-Nets of EDM (arXiv 2206.00364, table 1, appendix F.6), of one time: DDPM++ and ADM."""

    def __init__(self, weights, variant, width, mult, blocks, attention, size):
        self.w, self.ddpm, self.width, self.mult = weights, variant == "ddpm++", width, mult
        self.blocks, self.attention, self.size = blocks, attention, size
        self.eps = 1e-6 if self.ddpm else 1e-5
        self.scale = 0.5**0.5 if self.ddpm else 1.0

    def layer(self, name, x):
        w, b = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return x @ w.T + b if w.ndim == 2 else F.conv2d(x, w, b, padding=w.shape[-1] // 2)

    def standard(self, x):
        groups = min(32, x.shape[1] // 4)
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + self.eps).sqrt()
        return y.reshape(x.shape)

    def norm(self, name, x):
        return self.standard(x) * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def block(self, name, x, e, attention=False, change=lambda x: x):
        y = self.layer(f"{name}.conv1", change(F.silu(self.norm(f"{name}.norm1", x))))
        m = self.layer(f"{name}.modulation", e)[:, :, None, None]
        if self.ddpm:
            y = F.silu(self.norm(f"{name}.norm2", y + m))
        else:
            y = F.silu(self.standard(y) * m.chunk(2, dim=1)[0] + m.chunk(2, dim=1)[1])
        y = self.layer(f"{name}.conv2", y)
        x = change(x)
        assert (f"{name}.skip.weight" in self.w) >= (x.shape[1] != y.shape[1])
        x = ((self.layer(f"{name}.skip", x) if f"{name}.skip.weight" in self.w else x) + y) * self.scale
        if attention:
            b, c, h, w = x.shape
            heads = 1 if self.ddpm else max(1, c // 64)
            qkv = self.layer(f"{name}.attention.qkv", self.norm(f"{name}.attention.norm", x))
            q, k, v = (part.reshape(b * heads, c // heads, h * w) for part in qkv.chunk(3, dim=1))
            a = torch.einsum("ncq,nck->nqk", q, k / (c // heads) ** 0.5).softmax(dim=2)
            y = torch.einsum("nqk,nck->ncq", a, v).reshape(b, c, h, w)
            x = (self.layer(f"{name}.attention.out", y) + x) * self.scale
        assert attention == (f"{name}.attention.qkv.weight" in self.w)
        return x

    def __call__(self, x, t, label, data_std=0.5):
        n = self.width // 2
        phase = t[:, None] * torch.tensor([32 ** (k / (n - 1)) for k in range(n)])
        e, classes = torch.cat([phase.cos(), phase.sin()], dim=1), self.w["embedding.label.weight"][label]
        e = e + classes if self.ddpm else e
        e = self.layer("embedding.start.2", F.silu(self.layer("embedding.start.0", e)))
        e = F.silu(e if self.ddpm else e + classes)
        x = self.layer("stem", x / data_std)
        skips, size, n = [x], self.size, 0
        for level in range(len(self.mult)):
            if level:
                size //= 2
                x = self.block(f"down.{n}", x, e, change=lambda x: F.avg_pool2d(x, 2))
                skips.append(x)
                n += 1
            for _ in range(self.blocks):
                x = self.block(f"down.{n}", x, e, size in self.attention)
                skips.append(x)
                n += 1
        x = self.block("middle.1", self.block("middle.0", x, e, True), e)
        n = 0
        for level in reversed(range(len(self.mult))):
            if level < len(self.mult) - 1:
                size *= 2
                x = self.block(f"up.{n}", x, e, change=lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
                n += 1
            for i in range(self.blocks + 1):
                attention = size in self.attention and (i == self.blocks or not self.ddpm)
                x = self.block(f"up.{n}", torch.cat([x, skips.pop()], dim=1), e, attention)
                n += 1
        return data_std * self.layer("head.2", F.silu(self.norm("head.0", x)))


@pytest.mark.parametrize("variant", ["ddpm++", "adm"])
def test_unet_is_the_published_one(variant):
    shape = {"width": 32, "channel_mult": (1, 2, 4), "blocks": 2, "attention_resolutions": (8,)}
    network = randomised(UNet(image_size=16, channels=3, num_classes=5, variant=variant, **shape), std=0.1)
    x, label, t = 0.5 * torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 4, 5]), torch.rand(4)
    with torch.no_grad():
        for p in network.embedding.gap[2].parameters():
            p.zero_()
        ours = network(x, t, t, label)
        theirs = EDM(dict(network.state_dict()), variant, 32, (1, 2, 4), 2, (8,), 16)(x, t, label)
    assert theirs.std() > 0.01 and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
