"""DiT against an evaluation written down from the papers, on shared weights."""

import math

import pytest
import torch
from helpers.small_networks import randomised

from flowmaps.networks import PRESETS, DiT


def dit(weights, x, s, t, label, patch, heads, data_std, qk_norm, rms=False, decoupled=0, wide=False):
    """DiT with adaLN-zero (arXiv 2212.09748, section 3.2), two times added; ``t`` None: one time, as published.

    ``rms``: TVM's (arXiv 2511.19797); ``decoupled`` blocks are given s, the others and the head t: DMF's (2510.24474).
    ``wide``: the second time at the frequencies of MeanFlow's and SoFlow's (2512.15657), and as they count it.
    """
    w = weights

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x * torch.sigmoid(x)

    def root(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(x):
        if rms:
            return root(x)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    def chunks(name, e, count):
        parts = linear(name, e)[:, None].chunk(count, dim=-1)
        return [root(part) for part in parts] if rms else parts

    def mlp(name, time):
        frequencies = [10000 ** (-k / 128) if wide else 32 ** (k / 127) for k in range(128)]
        frequencies = torch.tensor(frequencies, dtype=x.dtype)
        phase = time[:, None] * frequencies
        features = torch.cat([phase.cos(), phase.sin()], dim=1)
        return linear(f"embedding.{name}.2", silu(linear(f"embedding.{name}.0", features)))

    b, c, size, _ = x.shape
    n, width = size // patch, w["stem.weight"].shape[0]
    tokens = [
        (x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] / data_std).reshape(b, -1)
        for i in range(n)
        for j in range(n)
    ]
    place = []
    for i in range(n):
        for j in range(n):
            omega = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
            place.append([f(p * o) for p in (j, i) for f in (math.sin, math.cos) for o in omega])
    h = linear("stem", torch.stack(tokens, dim=1)) + torch.tensor(place, dtype=x.dtype)
    table = w["embedding.label.weight"][label]
    if decoupled:
        e, later = (silu(mlp("start", time) + mlp("gap", 0 * time) + table) for time in (s, t))
    else:
        first = mlp("start", 1 - s if wide else s)
        e = later = silu(first + table + (0 if t is None else mlp("gap", t - s)))
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for k in range(depth):
        e = e if k < decoupled else later
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks(f"blocks.{k}.modulation", e, 6)
        y = linear(f"blocks.{k}.attention.qkv", norm(h) * (1 + scale1) + shift1)
        q, key, v = y.reshape(b, n * n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if qk_norm:
            g = w[f"blocks.{k}.attention.scales"]
            q, key = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * g[i] for i, z in enumerate((q, key)))
        a = torch.softmax(q @ key.mT / math.sqrt(width // heads), dim=-1) @ v
        h = h + gate1 * linear(f"blocks.{k}.attention.out", a.transpose(1, 2).reshape(b, n * n, width))
        y = linear(f"blocks.{k}.mlp.0", norm(h) * (1 + scale2) + shift2)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + gate2 * linear(f"blocks.{k}.mlp.3", y)
    shift, scale = chunks("modulation", later, 2)
    h = linear("head", norm(h) * (1 + scale) + shift)
    out = torch.zeros_like(x)
    for k in range(n * n):
        i, j = divmod(k, n)
        out[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = h[:, k].reshape(b, c, patch, patch)
    return -out if wide else data_std * out


@pytest.mark.parametrize("qk_norm", [False, True])
def test_dit_is_the_published_one(qk_norm):
    network = DiT(image_size=8, channels=3, patch=2, width=32, depth=3, heads=4, num_classes=5, qk_norm=qk_norm)
    network = randomised(network, std=0.15)
    x, label = 0.5 * torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 4, 5])  # 5: no label
    s, t = torch.rand(2, 4).sort(dim=0).values
    weights = dict(network.state_dict())
    with torch.no_grad():
        two = network(x, s, t, label)
        for p in network.embedding.gap[2].parameters():
            p.zero_()
        one = network(x, t, t, label)
    weights = {k: v.clone() for k, v in randomised(network, std=0.15).state_dict().items()}
    for ours, theirs in (
        (two, dit(weights, x, s, t, label, 2, 4, 0.5, qk_norm)),
        (one, dit(weights, x, t, None, label, 2, 4, 0.5, qk_norm)),
    ):
        assert theirs.std() > 0.01
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"norm": "rms", "qk_norm": True, "label_scale": 1.75}, 1.75),
        ({"decoupled": 2}, 1.0),
        ({"gap_embedding": "wide", "convention": "noise_at_one", "base_std": 1.0, "data_std": 1.0}, 1.0),
    ],
    ids=["terminal velocity matching", "decoupled", "wide"],
)
def test_dit_of_a_published_map_is_its(options, scale):
    network = DiT(image_size=8, channels=3, patch=2, width=32, depth=3, heads=4, num_classes=5, **options)
    network = randomised(network, std=0.15)
    x, label = 0.5 * torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 4, 5])  # 5: no label
    s, t = torch.rand(2, 4).sort(dim=0).values
    with torch.no_grad():
        ours = network(x, s, t, label)
    chosen = (options.get("qk_norm", False), "norm" in options, options.get("decoupled", 0), "gap_embedding" in options)
    theirs = dit(dict(network.state_dict()), x, s, t, label, 2, 4, options.get("data_std", 0.5), *chosen)
    theirs = theirs * torch.where(label == 5, 1.0, scale)[:, None, None, None]
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("options", [{"decoupled": 20}, {"norm": "rms"}, {"label_scale": 2.0}])
def test_options_of_published_maps_add_no_parameter(options):
    preset = PRESETS["dit-xl2-imagenet256"]
    with torch.device("meta"):
        plain, made = (DiT(**preset.options, **added).state_dict() for added in ({}, options))
    assert {name: w.shape for name, w in plain.items()} == {name: w.shape for name, w in made.items()}


def test_sizes_of_the_networks_of_published_maps():
    """In millions, as counted in the code of SoFlow, MeanFlow SiT and DMF, where positions are weights."""
    with torch.device("meta"):
        for width, depth, patch, heads, millions in ((768, 12, 4, 12, 131.21), (768, 12, 2, 12, 131.29)):
            sizes = {"width": width, "depth": depth, "patch": patch, "heads": heads, "num_classes": 1000}
            network = DiT(**sizes, gap_embedding="wide", convention="noise_at_one")
            assert round((network.num_parameters() + network.positions.numel()) / 1e6, 2) == millions
        for size, qk_norm, millions in ((32, False, 675.11), (64, True, 676.00)):
            options = {**PRESETS["dit-xl2-imagenet256"].options, "image_size": size, "qk_norm": qk_norm}
            network = DiT(**options, decoupled=20, gap_embedding="none")
            assert round((network.num_parameters() + network.positions.numel()) / 1e6, 2) == millions


def test_time_from_data_to_noise_is_the_same_drift():
    """``noise_at_one`` of F(x, 1 - s) and the opposite sign is ``velocity`` of F(x, s)."""
    plain, turned = (
        DiT(image_size=8, width=32, depth=2, heads=2, convention=c, data_std=1.0, base_std=1.0)
        for c in ("velocity", "noise_at_one")
    )
    randomised(plain, std=0.15)
    weights = plain.state_dict()
    turned.load_state_dict(weights | {k: -w for k, w in weights.items() if k.startswith("head.")})
    x, s = torch.randn(4, 4, 8, 8), torch.rand(4)
    with torch.no_grad():
        level = turned.body(x, s, s, s, None)
        torch.testing.assert_close(-level, plain(x, s, s), rtol=0, atol=1e-5)
        torch.testing.assert_close(turned(x, s, s), -turned.body(x, 1 - s, s, s, None), rtol=0, atol=1e-5)
