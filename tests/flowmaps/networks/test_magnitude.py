"""Magnitude preservation of EDM2UNet: at initialisation, and of its weights in training."""

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.small_networks import inputs, small

from configs.digits import get_config as digits
from flowmaps.networks import EDM2UNet
from flowmaps.networks.edm2unet import Block
from flowmaps.networks.magnitude import MPLayer, mp_add, mp_cat, mp_silu, mp_sum, normalise_weights, unit
from training.config import class_name, preset
from training.trainer import Trainer


def rms(x):
    return x.square().mean().sqrt().item()


def weight_rms(module):
    layers = [m for m in module.modules() if isinstance(m, MPLayer)]
    return torch.cat([m.weight.detach().flatten(1).square().mean(dim=1).sqrt() for m in layers])


@pytest.mark.parametrize(
    "operation",
    [
        mp_silu,
        lambda x: mp_sum(x, torch.randn_like(x), 0.3),
        lambda x: mp_add(x, torch.randn_like(x), torch.tensor([0.7])),
        lambda x: mp_cat(x, torch.randn_like(x[:, :4])),
        lambda x: unit(3 * x, dim=1),
        MPLayer(16, 64, 3),
        MPLayer(16, 64, 1),
        lambda x: MPLayer(16, 64)(x[:, :, 0, 0]),
    ],
)
def test_unit_variance_stays(operation):
    torch.manual_seed(0)
    with torch.no_grad():
        assert rms(operation(torch.randn(400, 16, 16, 16))) == pytest.approx(1, abs=0.06)  # a 3 x 3 layer loses the rim


def test_weights_are_normalised_as_in_the_forward_pass():
    fm = small("EDM2UNet")
    layers = [layer for layer in fm.modules() if isinstance(layer, MPLayer)]
    expected = [unit(layer.weight.detach(), tuple(range(1, layer.weight.ndim))) for layer in layers]
    normalise_weights(fm)
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=0)


def test_normalisation_in_half_precision_is_as_exact_as_its_result():
    x = torch.randn(8, 64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(unit(x.bfloat16(), 1).double(), unit(x, 1), rtol=2**-6, atol=0)


def test_balances_at_their_ends():
    a, b = torch.randn(2, 5, 3)
    assert torch.equal(mp_add(a, b, torch.zeros(1)), a)
    torch.testing.assert_close(mp_add(a, b, torch.ones(1)), mp_sum(a, b, 0.5))
    weight = mp_cat(torch.ones(1, 2, 1, 1), torch.ones(1, 6, 1, 1)).square()
    assert weight[:, :2].sum().item() == pytest.approx(weight[:, 2:].sum().item()) == pytest.approx(4)


def test_activations_have_unit_variance_at_initialisation():
    """Every block's output, and the network's when its gain is 1: what is lost is at the rim (zero padding)."""
    torch.manual_seed(0)
    shape = {"image_size": 16, "channels": 3, "width": 64, "channel_mult": (1, 2), "blocks": 3, "num_classes": 10}
    net, seen = EDM2UNet(**shape, attention_resolutions=(8,)).eval(), {}
    for name, module in net.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: rms(out)}))
    with torch.no_grad():
        net.gain.fill_(1.0)
        v = net(0.5 * torch.randn(64, 3, 16, 16), torch.rand(64), torch.rand(64), torch.arange(64) % 10)
    assert len(seen) == 7 + 2 + 9 and all(0.8 < value < 1.1 for value in seen.values()), seen
    assert rms(v) / 0.5 == pytest.approx(1, abs=0.1)


def test_the_size_of_a_weight_has_no_meaning():
    fm = small("EDM2UNet").double().eval()
    x, s, t, label = inputs(fm, 4, torch.float64)
    before = fm.velocity(x, s, t, label)
    normalise_weights(fm)
    torch.testing.assert_close(weight_rms(fm), torch.ones_like(weight_rms(fm)), rtol=2e-3, atol=0)
    torch.testing.assert_close(fm.velocity(x, s, t, label), before, rtol=1e-2, atol=1e-2)  # eps of small weights
    with torch.no_grad():
        for m in fm.modules():
            if isinstance(m, MPLayer):
                m.weight.mul_(1 + torch.rand(len(m.weight), *[1] * (m.weight.ndim - 1), dtype=torch.float64))
    after = fm.velocity(x, s, t, label)
    normalise_weights(fm)
    torch.testing.assert_close(fm.velocity(x, s, t, label), after, rtol=1e-3, atol=1e-3)


def edm2_config():
    config = digits("lagrangian_edm2,smoke")
    config.optim.warmup = 0
    return config


def test_every_weight_has_root_mean_square_one_after_a_step(monkeypatch):
    AcceleratorState._reset_state()
    trainer = Trainer.build(edm2_config())
    before = [p.clone() for p in trainer.module.parameters()]
    for step in range(3):
        trainer.step(step)
    sizes = weight_rms(trainer.module)
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=2e-4, atol=0)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.module.parameters(), strict=True))
    monkeypatch.setattr("training.trainer.normalise_weights", lambda module: None)
    trainer.step(3)
    assert (weight_rms(trainer.module) - 1).abs().max() > 1e-3  # what the hook undoes


def test_a_preset_takes_changes():
    section = preset("edm2-cifar10", dropout=0.0, num_classes=10)
    assert (class_name(section), section.dropout, section.num_classes, section.blocks) == ("EDM2UNet", 0.0, 10, 4)
