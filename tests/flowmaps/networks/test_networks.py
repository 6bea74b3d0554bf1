import inspect

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from helpers import generator
from helpers.small_networks import IMAGES, LABELLED, SMALL, inputs, small

from flowmaps import FlowMap
from flowmaps.networks import MLP, NETWORKS, PRESETS, DiT, EDM2UNet, UNet, registered
from flowmaps.networks.conditioning import with_guidance
from flowmaps.networks.dit import positions
from flowmaps.networks.layers import normalise
from flowmaps.objectives import OBJECTIVES, TrajectoryObjective
from samplers import Trajectory, uniform_times

TWO_TIMES = ("DiT decoupled", "DiT none", "IMFDiT")  # that know the second time from the first step on


def build(name):
    """A network in eval mode and six points of it."""
    fm = small(name).eval()
    return fm.network, inputs(fm, 6)[0]


class Affine(ModelMixin, ConfigMixin):
    """The example of ``flowmaps.networks.interface``."""

    @registered
    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(dim + 2, dim)

    def forward(self, x, s, t, label=None):
        return self.layer(torch.cat([x, s[:, None], t[:, None]], dim=1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_of_the_users_own_meets_the_protocol(name):
    network = Affine(dim=3)
    assert network.config.dim == 3 and list(inspect.signature(Affine).parameters) == ["dim"]
    fm, batch = FlowMap(network), torch.randn(8, 3)
    if issubclass(OBJECTIVES[name], TrajectoryObjective):
        batch = Trajectory(uniform_times(4), torch.randn(5, 2, 3))
    OBJECTIVES[name]()(fm, batch, generator=generator()).value.backward()
    assert network.layer.weight.grad.abs().max() > 0


def test_every_network_is_tested():
    assert {cls for cls, _ in SMALL.values()} == set(NETWORKS.values())


@pytest.mark.parametrize("name", SMALL)
def test_shape_dtype_and_dependence_on_each_input(name):
    network, x = build(name)
    s, t = torch.full((6,), 0.2), torch.full((6,), 0.7)
    v = network(x, s, t)
    assert v.shape == x.shape and v.dtype == x.dtype
    for changed in (network(x + 1, s, t), network(x, s + 0.1, t), network(x, s, t + 0.1)):
        assert not torch.allclose(v, changed)
    torch.testing.assert_close(network(x[:2], s[:2], t[:2]), v[:2])  # samples do not mix


@pytest.mark.parametrize("name", SMALL)
def test_save_and_load_is_bit_equal(name, tmp_path):
    network, x = build(name)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    s, t = torch.rand(6), torch.rand(6)
    assert torch.equal(again(x, s, t), network(x, s, t))


@pytest.mark.parametrize("name", LABELLED)
def test_label_and_no_label(name):
    network, x = build(name)
    s = torch.full((6,), 0.5)
    none, null = network(x, s, s), network(x, s, s, torch.full((6,), 4))
    assert torch.equal(none, null)  # label num_classes means no label
    assert not torch.allclose(none, network(x, s, s, torch.zeros(6, dtype=torch.int64)))


def test_mlp_has_no_label():
    s = torch.zeros(1)
    with pytest.raises(ValueError, match="unconditional"):
        MLP(width=8, depth=1)(torch.zeros(1, 2), s[:1], s[:1], torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", [name for name in IMAGES if not name.startswith(TWO_TIMES)])
def test_starts_as_a_one_time_network(name):
    """The branch of t - s starts at zero: a fresh network does not see the second time."""
    torch.manual_seed(0)
    cls, options = SMALL[name]
    network = cls(**options)
    for parameter_name, p in network.named_parameters():
        if "gap" not in parameter_name:
            torch.nn.init.normal_(p, std=0.2)
    x, s = torch.randn(3, 1, options["image_size"], options["image_size"]), torch.full((3,), 0.3)
    assert torch.equal(network(x, s, s), network(x, s, torch.full((3,), 0.9)))


@pytest.mark.parametrize("channels", [1, 3, 9, 17, 18, 36, 64, 192])
def test_normalise_takes_any_number_of_channels(channels):
    y = normalise(3 + 5 * torch.randn(2, channels, 8, 8))
    assert y.mean().abs() < 0.01 and abs(y.std() - 1) < 0.01


@pytest.mark.parametrize(
    "options", [{"image_size": 9}, {"width": 18, "heads": 2}, {"width": 16, "heads": 3}, {"data_std": 0.0}]
)
def test_dit_refuses_sizes_that_do_not_divide(options):
    with pytest.raises(ValueError, match=r"divisible|data_std"):
        DiT(**options)


def test_dit_knows_where_a_patch_is():
    """Without positions the network commutes with moving patches; with them it does not, and rows are not columns."""
    network, x = build("DiT")
    s, moved = torch.full((6,), 0.5), torch.roll(x, 4, dims=3)
    assert not torch.allclose(network(moved, s, s), torch.roll(network(x, s, s), 4, dims=3), atol=1e-3)
    assert not torch.allclose(network(x.mT, s, s), network(x, s, s).mT, atol=1e-3)
    network.positions.zero_()
    torch.testing.assert_close(network(moved, s, s), torch.roll(network(x, s, s), 4, dims=3), rtol=1e-4, atol=1e-5)
    table = positions(4, 16)
    row, column = torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)
    torch.testing.assert_close(table[:, 1], torch.sin(column * 0.1)), torch.testing.assert_close(table[:, 8], row.sin())


@pytest.mark.parametrize("convention", ["", "velocity", "ddpm:velocity:squaredcos_cap_v2:1000", "edm"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_decoupled_network_is_the_drift_it_came_from_and_splits_the_times(blocks, convention):
    """The same parameters; at s = t the same function bit for bit; a block, or the head, sees one time alone."""
    fm, decoupled = (small("DiT", convention=convention, decoupled=n).eval() for n in (0, blocks))
    x, s, t, label = inputs(fm, 6)
    decoupled.network.load_state_dict(fm.network.state_dict())
    assert torch.equal(decoupled.drift(x, s, label), fm.drift(x, s, label))
    assert decoupled.fingerprint() != fm.fingerprint()
    seen = {}

    def record(name):
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[-1])

    for i, block in enumerate(decoupled.network.blocks):
        block.register_forward_pre_hook(record(i))
    decoupled.network.modulation.register_forward_pre_hook(record("head"))
    for a, b in ((s, t), (s, t + 0.1), (s + 0.1, t)):
        decoupled.velocity(x, a, b, label)
    for place, (first, other_end, other_start) in seen.items():
        knows_start = place != "head" and place < blocks
        assert torch.equal(first, other_end) == knows_start and torch.equal(first, other_start) != knows_start


def test_the_output_of_rows_with_a_label_is_scaled():
    plain, scaled = (small("DiT", label_scale=scale).eval() for scale in (1.0, 2.0))
    x, s, t, label = inputs(plain, 6)
    expected = plain.velocity(x, s, t, label) * torch.where(label == 4, 1.0, 2.0)[:, None, None, None]
    torch.testing.assert_close(scaled.velocity(x, s, t, label), expected)
    rows = with_guidance(label, torch.ones(6), 4)
    torch.testing.assert_close(scaled.velocity(x, s, t, rows), expected)
    torch.testing.assert_close(scaled.network(x, s, t), plain.network(x, s, t), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"image_size": 8, "channel_mult": (1, 1, 1, 1, 1)}, {"image_size": 9, "patch": 2}])
def test_unet_refuses_sizes_that_do_not_divide(options):
    with pytest.raises(ValueError, match="image_size"):
        UNet(**options)


@pytest.mark.parametrize("name", IMAGES)
def test_in_bfloat16(name):
    network, x = build(name)
    s, t = torch.full((6,), 0.2), torch.full((6,), 0.7)
    exact = network(x, s, t)
    half = network.bfloat16()(x.bfloat16(), s, t)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_size(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        network = NETWORKS[preset.network](**preset.options)
        parameters = sum(p.numel() for p in network.parameters())
    assert parameters / 1e6 == pytest.approx(preset.millions, rel=5e-3)


@pytest.mark.parametrize("objective", ["flow_matching", "lagrangian", "eulerian", "consistency"])
@pytest.mark.parametrize("name", IMAGES)
def test_checkpointed_gradients_are_the_same(name, objective):
    """With dropout: off in some terms, shared between passes in others, and the backward pass comes after all that."""
    dropout = {"dropout": 0.3} if "dropout" in inspect.signature(SMALL[name][0]).parameters else {}
    fm, method, gradients, kept = small(name, **dropout).double(), OBJECTIVES[objective](), [], []
    x1, _, _, label = inputs(fm, 8, torch.float64)
    draws = method.draw(fm, x1, generator())
    for checkpointing in (False, True):
        if checkpointing:
            fm.network.enable_gradient_checkpointing()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            torch.manual_seed(0)
            loss = method.loss(fm, x1, label, draws).value
        gradients.append(torch.autograd.grad(loss, list(fm.parameters()), allow_unused=True))
        kept.append(sum(sizes))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert kept[1] < kept[0] / 2


QUICK = (("MLP", "none"), ("EDM2UNet", "labels"), ("DiT qk_norm", "rows"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(name, label, marks=[] if (name, label) in QUICK else [pytest.mark.slow])
        for name in SMALL
        for label in (("labels", "none", "rows") if name in LABELLED else ("none",))
    ],
)
def test_an_exported_map_takes_any_batch(name, label):
    """Through ``FlowMap``, with every kind of label: a batch that is frozen in the graph would fail here."""
    fm = small(name).eval()
    batch = torch.export.Dim("batch", min=2, max=64)

    def given(n):
        x, s, t, known = inputs(fm, n)
        if label == "rows":
            known = with_guidance(known, torch.linspace(1, 3, n), fm.info.num_classes)
        return x, s, t, None if label == "none" else known

    shapes = [None if part is None else {0: batch} for part in given(3)]
    exported = torch.export.export(fm, given(3), dynamic_shapes=shapes)
    for n in (2, 5):
        torch.testing.assert_close(exported.module()(*given(n)), fm(*given(n)))


def test_attention_at_a_resolution_that_no_level_has_is_refused():
    """At 48 pixels the levels are 48, 24 and 12: attention at 16 would be left out without a word."""
    for cls, options in ((UNet, {}), (UNet, {"patch": 2, "image_size": 96}), (EDM2UNet, {})):
        made = {"image_size": 48, "width": 8, "channel_mult": (1, 1, 1), "blocks": 1, **options}
        for wrong in ((16,), (24, 8), ("24",), "a"):
            with pytest.raises(ValueError, match=r"attention_resolutions has .*choose from 48, 24, 12"):
                cls(**made, attention_resolutions=wrong)
        network = cls(**made, attention_resolutions=(24, 12))
        assert {"attention"} <= {name.split(".")[-1] for name, _ in network.named_modules()} or network.down[2].heads


BOUNDS = [
    ("UNet", "num_classes", 10**12),
    ("UNet", "num_classes", -1),
    ("UNet", "image_size", 10**9),
    ("UNet", "image_size", 8.0),
    ("UNet", "blocks", 10**9),
    ("UNet", "width", 10**9),
    ("UNet", "channel_mult", ()),
    ("UNet", "channel_mult", (1, 0)),
    ("UNet", "channel_mult", 100 * (1,)),
    ("UNet", "channel_mult", (1, 10**9)),
    ("UNet", "dropout", 1.0),
    ("UNet", "data_std", float("inf")),
    ("UNet", "variant", "samll"),
    ("UNet", "convention", "edn"),
    ("UNet", "convention", "ddpm:noise"),
    ("UNet", "norm_groups", 3),
    ("UNet", "head_channels", -1),
    ("DiT", "variant", "adm"),
    ("DiT", "norm", "group"),
    ("DiT", "decoupled", 3),
    ("DiT", "decoupled", -1),
    ("DiT", "gap_embedding", "thin"),
    ("DiT", "gap_embedding", "none"),
    ("DiT", "label_scale", 0.0),
    ("DiT", "label_scale", float("nan")),
    ("EDM2UNet", "num_classes", 10**12),
    ("EDM2UNet", "augment_dim", 10**12),
    ("DiT", "image_size", 10**9),
    ("DiT", "image_size", 16_384),
    ("DiT", "num_classes", 10**12),
    ("DiT", "depth", 10**9),
    ("DiT", "mlp_ratio", float("nan")),
    ("DiT", "mlp_ratio", 1e9),
    ("IMFDiT", "head_depth", 4),
    ("IMFDiT", "head_depth", 0),
    ("IMFDiT", "heads", 3),
    ("IMFDiT", "hidden", -1),
    ("IMFDiT", "image_size", 16_384),
    ("IMFDiT", "data_std", 0.0),
    ("MLP", "depth", 10**9),
    ("MLP", "fourier_features", 10**12),
    ("MLP", "fourier_scale", float("nan")),
]


@pytest.mark.parametrize(("name", "option", "value"), BOUNDS)
def test_options_out_of_range_are_refused_by_name_before_anything_is_allocated(name, option, value):
    cls, options = SMALL[name]
    with pytest.raises(ValueError, match="patch.* at most" if value == 16_384 else option):
        cls(**{**options, option: value})
