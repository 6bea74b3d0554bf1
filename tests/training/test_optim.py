"""Muon: which parameters it takes, and its step."""

import math

import pytest
import torch
from helpers.runs import assert_same, tiny
from helpers.small_networks import SMALL, small
from helpers.two_processes import config_of
from torch import nn

from configs.checkerboard import get_config as checkerboard
from flowmaps import UserError
from flowmaps.objectives import FlowMatching
from training.checkpoint import load_checkpoint
from training.config import Optim, Optimizer
from training.forecast.forecast import forecast
from training.loss_module import LossModule
from training.optim import build_optimizer, matrices
from training.trainer import Trainer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(config, **changes):
    config.optim = Optim(name=Optimizer.muon, warmup=0, clip=0.0, **changes)
    return config


@pytest.mark.parametrize("name", list(SMALL))
def test_muon_takes_the_weights_of_linear_layers(name):
    network = small(name).network
    taken, all_of_them = matrices(network), dict(network.named_parameters())
    rest = all_of_them.keys() - taken.keys()
    assert all(taken[key] is all_of_them[key] for key in taken)
    linear = {f"{key}.weight" for key, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    if name.startswith("EDM2"):  # whose layers are MPLayers, the table of classes too
        table = {"EDM2UNet vector": "condition", "EDM2UNet image": "start"}.get(name, "label")
        assert f"embedding.{table}.weight" in taken and {p.ndim for p in taken.values()} == {2}
        assert all(all_of_them[key].ndim in (1, 4) for key in rest)
    else:
        assert taken.keys() == linear
        tables = {f"{key}.weight" for key, layer in network.named_modules() if isinstance(layer, nn.Embedding)}
        assert {key for key in rest if all_of_them[key].ndim == 2} - tables <= {
            key for key in rest if key.endswith(("attention.scales", ".tokens", "positions", "nothing"))
        }
    kernels = {key for key, p in all_of_them.items() if p.ndim == 4 and key.endswith("weight")}
    assert bool(kernels) is ("UNet" in name or "IMF" in name)
    assert matrices(network, kernels=True).keys() == taken.keys() | kernels
    module = LossModule(small(name), FlowMatching())
    optimizer = build_optimizer(Optim(name=Optimizer.muon, muon_kernels=True), module)  # whatever comes first
    assert len(optimizer.param_groups[0]["params"]) == len(taken) + len(kernels)


def by_name(trainer):
    """The parameters of each of Muon's parts, by name."""
    names = {p: name for name, p in trainer.module.named_parameters()}
    return [{names[p] for p in group["params"]} for group in trainer.optimizer.param_groups]


def test_all_else_of_a_run_goes_to_adamw():
    config = muon(tiny())
    config.weight.learned = True
    ours, others = by_name(trainer := Trainer.build(config))
    assert ours == {f"fm.network.{name}" for name in matrices(trainer.module.fm.network)}
    assert any(name.startswith("weight.") and name.endswith("weight") for name in others)  # which are matrices too
    assert ours | others == dict(trainer.module.named_parameters()).keys() and not ours & others


def test_a_run_that_trains_matrices_alone_or_none():
    """As low-rank changes are; and with none Muon has nothing to do."""
    module = Trainer.build(tiny()).module
    taken = set(matrices(module.fm.network).values())
    for p in module.parameters():
        p.requires_grad_(p in taken)
    (group,) = build_optimizer(Optim(name=Optimizer.muon), module).param_groups
    assert set(group["params"]) == taken
    for p in taken:
        p.requires_grad_(False)
    with pytest.raises(UserError, match=r"^optim\.name=muon: needs a layer with a trained 2-D weight: choose adamw$"):
        build_optimizer(Optim(name=Optimizer.muon), module)


def newton_schulz(update):
    """Five steps of the quintic iteration in float64, on the wide form of a matrix."""
    a, b, c = COEFFICIENTS
    x = update if len(update) <= len(update[0]) else update.mT
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if len(update) <= len(update[0]) else x.mT


@pytest.mark.parametrize(
    ("row", "decay", "bf16"),
    [
        ("lagrangian_dit", 0.0, True),
        ("lagrangian_dit", 0.0, False),
        ("lagrangian_dit", 0.1, False),
        ("lagrangian", 0.1, False),
    ],
)
def test_steps_are_those_of_the_formula(row, decay, bf16, monkeypatch):
    """Two steps: momentum 0.95, Nesterov, Newton-Schulz, sqrt(max(1, out / in)); AdamW for the rest.

    A kernel moves as the matrix of its outputs by all that each of them sums. torch iterates in bfloat16, whose
    mantissa has 8 bits; here also in float64.
    """
    if not bf16:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double, raising=True)
    kernels = row == "lagrangian"
    trainer = Trainer.build(muon(config_of(row, ""), lr=0.01, weight_decay=decay, muon_kernels=kernels))
    if kernels:
        trainer.module.fm.network.to(memory_format=torch.channels_last)  # whose matrices are not views
    taken = matrices(trainer.module.fm.network, kernels)
    shapes = {tuple(p.flatten(1).shape) for p in taken.values()}
    assert any(a > b for a, b in shapes) and any(a < b for a, b in shapes)
    assert {p.ndim for p in taken.values()} == ({2, 4} if kernels else {2})
    rest = [p for p in trainer.module.parameters() if p not in set(taken.values())]
    twins = [nn.Parameter(p.detach().clone()) for p in rest]
    adamw = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.999), weight_decay=decay)
    expected = {name: p.detach().double() for name, p in taken.items()}
    momentum = {name: torch.zeros_like(w) for name, w in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in trainer.module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for p, twin in zip(rest, twins, strict=True):
            twin.grad = p.grad.clone()
        moves = {}
        for name, w in expected.items():
            gradient = taken[name].grad.double()
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            update = newton_schulz((0.05 * gradient + 0.95 * momentum[name]).flatten(1)).view(w.shape)
            moves[name] = -0.01 * math.sqrt(max(1, len(w) / w[0].numel())) * update - 0.01 * decay * w
            expected[name] = w + moves[name]
        trainer.optimizer.step()
        adamw.step()
        for name, w in expected.items():
            assert (taken[name] - w).norm() < (0.05 if bf16 else 2e-5) * moves[name].norm(), name
        for p, twin in zip(rest, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=0, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nesterov_steps_beside_muon_are_those_of_the_formula(decay, tmp_path):
    """The next step's momentum, the gradient counted once more, over the usual second moment; resumed bit-equal."""
    trainer = Trainer.build(muon(tiny(), lr=0.01, betas=(0.9, 0.95), nesterov=True, weight_decay=decay))
    rest = trainer.optimizer.param_groups[1]["params"]
    expected = [p.detach().double() for p in rest]
    first, second = ([torch.zeros_like(w) for w in expected] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 5):
        for p in trainer.module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for i, p in enumerate(rest):
            g = p.grad.double()
            first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.95 * second[i] + 0.05 * g**2
            ahead = 0.9 * first[i] / (1 - 0.9 ** (n + 1)) + 0.1 * g / (1 - 0.9**n)
            move = ahead / ((second[i] / (1 - 0.95**n)).sqrt() + 1e-8)
            expected[i] = (1 - 0.01 * decay) * expected[i] - 0.01 * move
        trainer.optimizer.step()
        for p, w in zip(rest, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)
    trainer.checkpoint(tmp_path / "step-00000004", 4)
    again = Trainer.build(trainer.config)
    load_checkpoint(tmp_path / "step-00000004", again.module, again.optimizer, again.ema)
    for one in (trainer, again):
        one.optimizer.zero_grad()
        one.step(4)
    assert_same(trainer.module.state_dict(), again.module.state_dict())
    with pytest.raises(UserError, match=r"^optim\.nesterov=True: is for the AdamW next to Muon"):
        tiny(optim=Optim(nesterov=True)).validate()


def test_kernels_are_for_muon_alone():
    with pytest.raises(UserError, match=r"^optim\.muon_kernels=True: is for Muon: set optim\.name=muon$"):
        tiny(optim=Optim(muon_kernels=True)).validate()


def test_the_rate_of_a_step_is_that_of_both(tmp_path):
    trainer = Trainer.build(muon(tiny(), lr=0.02))
    trainer.step(0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.02, 0.02]
    trainer.checkpoint(tmp_path / "step-00000001", 1)
    again = Trainer.build(trainer.config)
    load_checkpoint(tmp_path / "step-00000001", again.module, again.optimizer, again.ema)
    for one in (trainer, again):
        one.step(1)
    assert_same(trainer.module.state_dict(), again.module.state_dict())
    state = again.optimizer.state
    kept = [set(state[p]) for group in again.optimizer.param_groups for p in group["params"][:1]]
    assert kept == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]


def test_a_forecast_knows_one_momentum_for_each_matrix_and_the_products_of_the_update():
    """On 2 GPUs and in 4 micro-steps the update is done twice, not eight times."""
    config = checkerboard("lagrangian,smoke")
    config.batch = 32
    adamw = forecast(config)
    ours = forecast(muon(config))
    sizes = [p.shape for p in matrices(Trainer.build(config).module.fm.network).values()]
    saved = 4 * sum(shape.numel() for shape in sizes) + 4 * len(sizes)  # AdamW also counts the steps of each
    assert adamw.parts["optimiser"] - ours.parts["optimiser"] == pytest.approx(saved, rel=1e-3)
    update = sum(5 * 2 * (2 * min(s) ** 2 * max(s) + min(s) ** 3) for s in sizes)
    assert adamw.flops == {"TF32": adamw.flops["TF32"]} and ours.flops["bf16"] == update
    assert ours.flops["TF32"] == adamw.flops["TF32"]
    config.accumulate = 4
    assert forecast(config, gpus=2).flops["bf16"] == 2 * update
