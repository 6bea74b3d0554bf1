import pytest
import torch

from flowmaps.networks import MLP, NETWORKS, UNet
from flowmaps.networks.layers import normalise

UNET = {"channel_mult": (1, 2), "blocks": 2, "attention_resolutions": (4,), "num_classes": 4}
SMALL = {
    "MLP": ({"width": 16, "depth": 2, "fourier_features": 3}, (2,)),
    "UNet": ({"image_size": 8, "channels": 1, "width": 8, **UNET}, (1, 8, 8)),
}


def build(name):
    torch.manual_seed(0)
    options, shape = SMALL[name]
    network = NETWORKS[name](**options).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network, torch.randn(6, *shape)


def test_every_network_is_tested():
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_shape_dtype_and_dependence_on_each_input(name):
    network, x = build(name)
    s, t = torch.full((6,), 0.2), torch.full((6,), 0.7)
    v = network(x, s, t)
    assert v.shape == x.shape and v.dtype == x.dtype
    for changed in (network(x + 1, s, t), network(x, s + 0.1, t), network(x, s, t + 0.1)):
        assert not torch.allclose(v, changed)
    torch.testing.assert_close(network(x[:2], s[:2], t[:2]), v[:2])  # samples do not mix


@pytest.mark.parametrize("name", NETWORKS)
def test_save_and_load_is_bit_equal(name, tmp_path):
    network, x = build(name)
    network.save_pretrained(tmp_path)
    again = NETWORKS[name].from_pretrained(tmp_path)
    s, t = torch.rand(6), torch.rand(6)
    assert torch.equal(again(x, s, t), network(x, s, t))


def test_label_and_no_label():
    network, x = build("UNet")
    s = torch.full((6,), 0.5)
    none, null = network(x, s, s), network(x, s, s, torch.full((6,), 4))
    assert torch.equal(none, null)  # label num_classes means no label
    assert not torch.allclose(none, network(x, s, s, torch.zeros(6, dtype=torch.int64)))
    with pytest.raises(ValueError, match="unconditional"):
        MLP(width=8, depth=1)(torch.zeros(1, 2), s[:1], s[:1], torch.zeros(1, dtype=torch.int64))


def test_unet_starts_as_a_one_time_network():
    """The branch of t - s starts at zero: a fresh network does not see the second time."""
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=1, width=8, channel_mult=(1,), blocks=1, attention_resolutions=())
    for parameter_name, p in network.named_parameters():
        if "embedding.gap" not in parameter_name:
            torch.nn.init.normal_(p, std=0.2)
    x, s = torch.randn(3, 1, 8, 8), torch.full((3,), 0.3)
    assert torch.equal(network(x, s, s), network(x, s, torch.full((3,), 0.9)))


@pytest.mark.parametrize("channels", [1, 3, 9, 17, 18, 36, 64, 192])
def test_normalise_takes_any_number_of_channels(channels):
    y = normalise(3 + 5 * torch.randn(2, channels, 8, 8))
    assert y.mean().abs() < 0.01 and abs(y.std() - 1) < 0.01


@pytest.mark.parametrize("options", [{"image_size": 8, "channel_mult": (1, 1, 1, 1, 1)}, {"image_size": 9, "patch": 2}])
def test_unet_refuses_sizes_that_do_not_divide(options):
    with pytest.raises(ValueError, match="image_size"):
        UNet(**options)


def test_unet_in_bfloat16():
    network, x = build("UNet")
    s, t = torch.full((6,), 0.2), torch.full((6,), 0.7)
    exact = network(x, s, t)
    half = network.bfloat16()(x.bfloat16(), s, t)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.05
