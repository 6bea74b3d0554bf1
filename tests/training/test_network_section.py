"""The network section of a config: names and options that do not exist are refused before a network is built."""

import pytest
import torch
from helpers import ROOT

from flowmaps import UserError
from flowmaps.networks import PRESETS, UNet
from flowmaps.networks.layers import SelfAttention
from training.config import build_network, network, preset
from training.config_rows import load_row


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


@pytest.mark.parametrize("size", [48, 64, 96, 128, 160, 192, 256])
def test_a_folder_of_images_of_another_size_has_attention_or_says_what_to_set(size):
    config = load_row(str(ROOT / "configs/folder.py"), "lagrangian")
    config.network.image_size = size
    levels = [size // 2**k for k in range(4)]
    with torch.device("meta"):
        if not {16, 8} <= set(levels):
            with pytest.raises(UserError, match=f"choose from {', '.join(map(str, levels))}") as error:
                build_network(config)
            assert error.value.field == "network" and "attention_resolutions" in str(error.value)
            config.network.attention_resolutions = tuple(levels[-2:])
        made = build_network(config)
    assert sum(isinstance(module, SelfAttention) for module in made.modules()) > 10
