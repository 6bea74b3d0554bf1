"""The network section of a config: names and options that do not exist are refused before a network is built."""

from dataclasses import replace

import pytest
import torch
from helpers import ROOT

from flowmaps import UserError
from flowmaps.networks import PRESETS, UNet
from flowmaps.networks.layers import SelfAttention
from training.config import build_network, network, preset
from training.config_rows import load_row
from training.network_section import fitted


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: preset("edm2-cifar100"),
            r"^preset=edm2-cifar100: .* did you mean edm2-cifar10\? choose one of edm2-cifar10, ",
        ),
        (lambda: preset("edm2-cifar10", wide=64), r"^network.wide: EDM2UNet has no such option: did you mean width\?"),
        (lambda: network("edm2-cifar10"), r"^network=edm2-cifar10: must be a class of networks, such as MLP"),
        (lambda: network(dict), r"^network=.*: must be a class"),
        (lambda: network(UNet, wide=64), r"^network.wide: UNet has no such option: did you mean width\?"),
    ],
)
def test_networks_that_do_not_exist_are_refused(make, reason):
    with pytest.raises(UserError, match=reason):
        make()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_attention_that_it_names(name):
    with torch.device("meta"):
        preset(name).network_class(**PRESETS[name].options)  # a resolution of no level would be refused


@pytest.mark.parametrize("variant", ["", ",small"])
@pytest.mark.parametrize("size", [48, 64, 96, 128, 160, 192, 256])
def test_a_folder_of_images_of_any_size_has_attention_at_the_two_lowest_levels(size, variant):
    config = load_row(str(ROOT / "configs/folder.py"), f"lagrangian{variant}")
    config.network.image_size = size
    made = fitted(config.network, (1, size, size), 7)
    assert config.network.channels is None and (made.channels, made.num_classes) == (1, 7)
    with torch.device("meta"):
        built = build_network(replace(config, network=made))  # an attention at no level would be refused
    levels = [size // made.patch // 2**k for k in range(len(made.channel_mult))]
    assert made.attention_resolutions == tuple(levels[-2:])
    assert sum(isinstance(module, SelfAttention) for module in built.modules()) >= 5
    assert variant == "" or sum(p.numel() for p in built.parameters()) < 3e6


def test_what_is_set_is_not_taken_from_the_data():
    section = network(UNet, image_size=32, channels=1, num_classes=0)
    assert fitted(section, (3, 32, 32), 7) == section
    section.num_classes = None
    assert fitted(section, (3, 32, 32), 7).num_classes == 7
