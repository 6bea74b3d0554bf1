"""IMFDiT against an evaluation written down from its paper, on shared weights; its two heads; its derivatives."""

import math

import pytest
import torch
from helpers.small_networks import inputs, randomised, small

from flowmaps import FlowMap
from flowmaps.derivatives import velocity_jvp
from flowmaps.networks import NETWORKS, PRESETS, IMFDiT
from flowmaps.networks.conditioning import with_guidance
from flowmaps.networks.rotary import grid_turns, rotate, sequence_turns

OPTIONS = {"image_size": 8, "channels": 3, "patch": 2, "width": 32, "depth": 4, "head_depth": 2, "heads": 4}
TOLD = {"num_classes": 5, "guidance": True, "guidance_interval": True}
INFERENCE = {  # millions; of imf with an unused last layer
    **{"imf-b2-imagenet256": 88.95, "imf-m2-imagenet256": 173.92},
    **{"imf-l2-imagenet256": 409.07, "imf-xl2-imagenet256": 610.43},
    **{"pmf-b16-imagenet256": 118.23, "pmf-l16-imagenet256": 410.32, "pmf-h16-imagenet256": 955.51},
    **{"pmf-b32-imagenet512": 120.30, "pmf-l32-imagenet512": 412.98, "pmf-h32-imagenet512": 959.05},
}


def imf(weights, x, s, t, label, told, patch, heads, data_std, head="head", pixels=False):
    """Improved MeanFlow's network (arXiv 2512.02012) with conditions ``told`` = (w, low, high).

    ``pixels``: pixel MeanFlow's (arXiv 2601.22158).
    """
    w = weights

    def linear(name, y):
        bias = f"{name}.bias"
        return y @ w[f"{name}.weight"].T + (w[bias] if bias in w else 0)

    def rms(y, g):
        return g * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def emb(name, a):
        phase = a[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=x.dtype)
        y = linear(f"prefix.{name}.embed.0", torch.cat([phase.cos(), phase.sin()], dim=1))
        return linear(f"prefix.{name}.embed.2", y * torch.sigmoid(y))

    def angle_of(j, i, c):
        if not pixels:
            return j * 10000 ** (-2 * i / c)
        if j < 20:
            return 0.0
        row, column = divmod(j - 20, n)
        return (row if i < c // 4 else column) * 10000 ** (-2 * (i % (c // 4)) / (c // 2))

    def turned(y):  # [n, c]
        made = torch.zeros_like(y)
        for j in range(len(y)):
            for i in range(y.shape[1] // 2):
                angle = angle_of(j, i, y.shape[1])
                a, b = y[j, 2 * i], y[j, 2 * i + 1]
                made[j, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                made[j, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return made

    def block(name, h):
        y, size = rms(h, w[f"{name}.norm1.weight"]), h.shape[-1] // heads
        parts = []
        for k in range(heads):
            here = slice(k * size, (k + 1) * size)
            q, key = (
                rms(linear(f"{name}.attention.{p}", y)[..., here], w[f"{name}.attention.{p}_norm.weight"])
                for p in ("q", "k")
            )
            q, key = (torch.stack([turned(row) for row in z]) for z in (q, key))
            score = torch.softmax(q @ key.mT / math.sqrt(size), dim=-1)
            parts.append(score @ linear(f"{name}.attention.v", y)[..., here])
        h = h + w[f"{name}.attention_scale"] * linear(f"{name}.attention.out", torch.cat(parts, dim=-1))
        y = rms(h, w[f"{name}.norm2.weight"])
        gate = linear(f"{name}.mlp.w1", y)
        y = linear(f"{name}.mlp.w2", gate * torch.sigmoid(gate) * linear(f"{name}.mlp.w3", y))
        return h + w[f"{name}.mlp_scale"] * y

    weight, low, high = told
    b, c, size, _ = x.shape
    n = size // patch
    vectors = {
        "classes": w["prefix.classes.embed.weight"][label],
        "guidance": emb("guidance", 1 - 1 / weight),
        "high": emb("high", 1 - high),
        "low": emb("low", 1 - low),
        "gap": emb("gap", t - s),
    }
    h = [w[f"prefix.{name}.tokens"] + vector[:, None] for name, vector in vectors.items()]
    kernel = w["stem.0.weight"].flatten(1)
    for i in range(n):
        for j in range(n):
            cut = x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] / data_std
            y = cut.reshape(b, -1) @ kernel.T + w["stem.0.bias"]
            h.append((y @ w["stem.1.weight"][..., 0, 0].T + w["stem.1.bias"] if pixels else y)[:, None])
    h = torch.cat(h, dim=1) + (w["positions"] if pixels else 0)
    assert h.shape[1] == 20 + n**2
    for part in ("blocks", f"{head}_blocks"):
        for k in range(sum(name.startswith(f"{part}.") and name.endswith("norm1.weight") for name in w)):
            h = block(f"{part}.{k}", h)
    last = "head" if head == "head" else "second_output"
    h = linear(f"{last}.1", rms(h[:, 20:], w[f"{last}.0.weight"]))
    out = torch.zeros_like(x)
    for k in range(n * n):
        i, j = divmod(k, n)
        made = h[:, k].reshape(b, patch, patch, c).permute(0, 3, 1, 2)
        out[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = made
    if pixels:
        return (data_std * out - x) / torch.clamp(1 - s, min=0.05)[:, None, None, None]
    return -data_std * out


def drawn(n=4, dtype=torch.float32):
    """x, s < t, labels (5: none), and (w, low, high)."""
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(n) + 2
    s, t = torch.rand(2, n, generator=generator, dtype=dtype).sort(dim=0).values
    told = torch.rand(3, n, generator=generator, dtype=dtype) * torch.tensor([[7.0], [0.5], [0.5]])
    return x, s, t, label, told + torch.tensor([[1.0], [0.0], [0.5]])


PIXELS = {"prediction": "data", "bottleneck": 6, "rotation": "grid", "hidden": 88}


@pytest.mark.parametrize("options", [{}, PIXELS], ids=["improved MeanFlow", "pixel MeanFlow"])
def test_both_heads_are_the_published_ones(options):
    network = randomised(IMFDiT(**OPTIONS, **TOLD, **options), std=0.2)
    x, s, t, label, told = drawn()
    s[-1], t[-1] = 0.97, 0.99  # where 1 - s is clamped
    rows = with_guidance(label, told.T, 5)
    with torch.no_grad():
        v, second = network.pair(x, s, t, rows)
        alone = network(x, s, t, rows), network.second(x, s, t, rows), network.for_sampling()(x, s, t, rows)
    assert torch.equal(alone[0], v) and torch.equal(alone[1], second) and torch.equal(alone[2], v)
    weights = dict(network.state_dict())
    for ours, head in ((v, "head"), (second, "second")):
        theirs = imf(weights, x, s, t, label, told, 2, 4, 0.5, head, pixels=bool(options))
        assert theirs.std() > 0.01
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", INFERENCE)
def test_presets_have_the_published_size_with_and_without_the_second_head(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        network = NETWORKS[preset.network](**preset.options)
        without = NETWORKS[preset.network](**preset.options, second_head=False)
    for made, millions in ((network, preset.millions), (without, INFERENCE[name])):
        assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, rel=3e-3)
    assert network.for_sampling().state_dict().keys() == without.state_dict().keys()


def test_a_fresh_network_is_zero_and_has_the_published_spread():
    torch.manual_seed(0)
    network = IMFDiT(**{**OPTIONS, "width": 256}, **TOLD)
    x, s, t, label, told = drawn()
    v, second = network.pair(x, s, t, with_guidance(label, told.T, 5))
    assert not v.any() and not second.any()
    block = network.second_blocks[1]
    for weight, std in (
        (block.attention.q.weight, 0.32 / 16),
        (block.mlp.w2.weight, 0.32 / math.sqrt(682)),
        (network.prefix["gap"].embed[0].weight, 1 / 16),
        (network.prefix["classes"].embed.weight, 1 / 16),
        (network.prefix["guidance"].tokens, 1 / 16),
        (network.stem[0].weight, math.sqrt(2 / (12 + 256))),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_only_the_gap_is_told_and_the_order_of_the_prefix_counts():
    network = randomised(IMFDiT(**OPTIONS, **TOLD))
    x, s, t, label, told = drawn()
    rows = with_guidance(label, told.T, 5)
    with torch.no_grad():
        v = network(x, s, t, rows)
        torch.testing.assert_close(network(x, s - s, t - s, rows), v)
        for column in range(3):  # each told number counts
            changed = told.clone()
            changed[column] = (1, 0, 1)[column]
            assert not torch.allclose(network(x, s, t, with_guidance(label, changed.T, 5)), v, atol=1e-4)
        a, b = network.prefix["low"], network.prefix["high"]
        network.prefix["low"], network.prefix["high"] = b, a
        swapped = told[[0, 2, 1]]  # the tokens of low and high trade places and keep what they receive
        assert not torch.allclose(network(x, s, t, with_guidance(label, swapped.T, 5)), v, atol=1e-3)


def test_a_rotated_product_depends_on_the_difference_of_positions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 9, 8)
    turns = sequence_turns(9, 8)
    products = (rotate(q, turns) @ rotate(k, turns).mT)[0, 0]
    for offset in range(-8, 9):
        along = products.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)
    assert products[0].std() > 0.1
    assert torch.allclose(rotate(q, turns).norm(dim=-1), q.norm(dim=-1))


def test_a_rotated_product_of_patches_depends_on_the_differences_of_rows_and_columns():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 3 + 16, 8)
    turns = grid_turns(3, 4, 8)
    products = (rotate(q, turns) @ rotate(k, turns).mT)[0, 0]
    torch.testing.assert_close(products[:3, :3], products[0, 0].expand(3, 3))  # the prefix stays
    patches, seen = products[3:, 3:].reshape(4, 4, 4, 4), {}
    for a, b, c, d in torch.cartesian_prod(*4 * [torch.arange(4)]).tolist():
        seen.setdefault((c - a, d - b), []).append(patches[a, b, c, d].item())
    assert all(max(values) - min(values) < 1e-5 for values in seen.values())
    assert len({round(values[0], 4) for values in seen.values()}) > 40  # of 49


def test_a_fresh_network_of_pixels_predicts_zero():
    network = IMFDiT(**OPTIONS, **TOLD, **PIXELS)
    x, s, t, *_ = drawn()
    s[-1], t[-1] = 0.97, 0.99
    v = -x / torch.clamp(1 - s, min=0.05)[:, None, None, None]
    for made in network.pair(x, s, t):
        torch.testing.assert_close(made, v)
    torch.testing.assert_close(FlowMap(network)(x, 0.0, 1.0, torch.arange(4)), 0 * x)


@pytest.mark.parametrize("options", [{}, PIXELS], ids=["velocity", "data"])
@pytest.mark.parametrize("moving", ["x", "s", "t"])
def test_derivatives_match_central_differences(moving, options):
    fm = small("IMFDiT", **options).double()
    x, s, t, label = inputs(fm, 6, torch.float64)
    s[-1], t[-1] = 0.97, 0.99  # where 1 - s is clamped: no term from the denominator
    dx, step = torch.randn_like(x), 1e-5
    rates = {"x": {"dx": dx}, "s": {"ds": 1.0}, "t": {"dt": 1.0}}[moving]
    v, dv = velocity_jvp(fm, x, s, t, label, **rates)
    moved = [
        fm.velocity(x + (moving == "x") * h * dx, s + (moving == "s") * h, t + (moving == "t") * h, label)
        for h in (step, -step)
    ]
    torch.testing.assert_close(v, fm.velocity(x, s, t, label))
    torch.testing.assert_close(dv, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_second_head_can_be_left_out():
    network = IMFDiT(**OPTIONS, second_head=False)
    x, s, t, *_ = drawn()
    assert network(x, s, t).shape == x.shape
    with pytest.raises(ValueError, match="without its second head"):
        network.second(x, s, t)
