"""The host waits for the device once per training step, and never per sampling step."""

from functools import partial

import pytest
import torch
from helpers.fake_cuda import WAITS, caller, fake_cuda, fake_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs import checkerboard, digits
from flowmaps import FlowMap, FlowMapInfo
from flowmaps.generate import generate
from flowmaps.interpolants import INTERPOLANTS
from samplers import SAMPLERS, uniform_times
from training.config import Optimizer
from training.trainer import Trainer

NORM = "_local_scalar_dense in training.trainer.Trainer.step"


@pytest.mark.parametrize(
    ("file", "row", "optimizer"),
    [
        (checkerboard, "lagrangian", "adamw"),
        (checkerboard, "lagrangian", "radam"),
        (checkerboard, "lagrangian", "muon"),
        (checkerboard, "terminal_velocity", "adamw"),  # whose teacher follows
        (checkerboard, "mid_training", "adamw"),
        (digits, "lagrangian_edm2", "radam"),  # whose weights are normalised
    ],
)
def test_a_training_step_waits_for_the_gradient_norm_alone(file, row, optimizer):
    """Without the operations of the backward pass, which fake tensors cannot run."""
    config = file.get_config(row)
    config.optim.name, config.optim.spike, config.accumulate = Optimizer[optimizer], 10.0, 2
    with fake_cuda() as watch:
        trainer, _ = fake_trainer(config, 64, bf16=True)
        logged = trainer.step(0)
    assert watch.waits == [NORM]
    assert all(value.is_cuda for value in logged.values())
    assert trainer.skipped == trainer.spikes.count == 0


class Reads(TorchDispatchMode):
    """Records the operations whose numbers the host reads, by function."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            self.found.append(f"{func.overloadpacket.__name__} in {caller()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", ["lagrangian", "mean_flow"])
def test_no_operation_of_a_backward_pass_is_read(row):
    trainer = Trainer.build(digits.get_config(f"{row},smoke"))
    with Reads() as reads:
        trainer.step(0)
    assert reads.found == [NORM]


class Scaled(nn.Module):
    """The least network: a multiple of x."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x, s, t, label=None):
        return self.factor * x


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_generate_waits_for_nothing(sampler, guidance, steps):
    """Noise, labels and the grid of a batch are copied, and with fresh noise that of each step but the last."""
    row = SAMPLERS[sampler]
    with fake_cuda() as watch:
        with torch.device("cuda"):
            info = FlowMapInfo(shape=(2,), num_classes=4, label_dropout=0.1)
            fm = FlowMap(Scaled(), info=info)
        guidance = guidance if row.of == "drift" else None  # a map has it in its weights
        batches = list(generate(fm, uniform_times(steps), 6, 0, sampler=sampler, guidance=guidance, batch=3))
    assert len(batches) == 2 and all(x.is_cuda and label.is_cuda for x, label in batches)
    assert not watch.waits
    assert len(watch.copies) == 2 * (3 + (steps - 1) * row.renoises)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_grid_on_the_device_is_read_before_the_first_step(sampler):
    row, called = SAMPLERS[sampler], []
    with fake_cuda() as watch, torch.device("cuda"):

        def model(x, *times_and_label):
            called.append(len(watch.waits))
            return x

        noise = partial(torch.zeros, 3, 2)
        options = {"path": INTERPOLANTS["linear"], "noise": lambda k: noise()} if row.renoises else {}
        row.run(model, torch.zeros(3, 2), torch.linspace(0, 1, 6), **options)
    assert len(called) == 5 * row.nfe
    assert set(called) == {len(watch.waits)}
