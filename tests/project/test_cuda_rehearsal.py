"""The loss of every config row on fake CUDA tensors: what a GPU would refuse, wait for or widen to float32."""

import copy
import importlib

import pytest
import torch
from helpers import ROOT
from helpers.fake_cuda import fake_cuda, fake_trainer

from flowmaps.objectives import Lagrangian
from flowmaps.objectives.mid_training import Distance
from training.config_rows import Chain

BATCH = 512  # more numbers in an activation than in a shrunken network's weight
SHRUNKEN = {
    "MLP": {"width": 32, "depth": 2},
    "UNet": {"width": 32, "blocks": 1, "channel_mult": (1, 2)},
    "EDM2UNet": {"width": 32, "blocks": 1, "channel_mult": (1, 2)},
    "DiT": {"width": 96, "depth": 2, "heads": 2},
    "IMFDiT": {"width": 96, "depth": 2, "head_depth": 1, "heads": 2, "hidden": 0},
}
# Copies to the device that a step makes, none of which waits. "In each pass" is said of weights from DDPM.
COPIES = {
    "training.trainer.Trainer.micro_step_loss",  # items and labels
    "flowmaps.vae.channels",  # shift and scale of latents
    "flowmaps.parametrisations.ddpm",  # the table of noise levels, in each pass
    "training.teacher_trajectories.TrajectorySolver.__call__",  # times of trajectories, here and below
    "samplers.callables.intervals",
    "flowmaps.objectives.trajectory.TrajectoryObjective.prepare",
    "flowmaps.objectives.straightening.Straightening.segment_indices",
    "flowmaps.objectives.straightening.Straightening.states",
}
WIDE = {  # features of float32 points and times, larger than the points, or the digits, and the table of residuals
    "flowmaps.networks.mlp.MLP.forward",
    "flowmaps.networks.conditioning.time_features",
    "flowmaps.objectives.loss_weight.LogVariance.forward",
    "training.loss_module.table",
}


def config_rows():
    """The configs of every row of every file, by "file:row" or "file:row,stage"."""
    for file in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        for row in [*module.ROWS, *["lagrangian,ddpmpp"] * hasattr(module, "ddpmpp")]:
            made = module.get_config(row)
            for stage, config in made.stages().items() if isinstance(made, Chain) else [("", made)]:
                yield f"{file.stem}:{row}" + f",{stage}" * bool(stage), config


ALL = dict(config_rows())


def quick_rows():
    """All objectives on points in both precisions, and every kind of network, with a derivative if a row has one."""
    networks = {}
    for name, config in ALL.items():
        net, derivative = config.network, isinstance(config.objective, Lagrangian)
        if hasattr(net, "dim"):
            yield from ((name, False), (name, True))
        else:
            options = ("variant", "convention", "guidance", "qk_norm")
            kind = net.network_class, net.channels == 4, *(getattr(net, option, "") for option in options)
            if kind not in networks or (derivative and not networks[kind][1]):
                networks[kind] = name, derivative
    yield from ((name, True) for name, _ in networks.values())


def shrunken(config):
    config, net = copy.deepcopy(config), config.network.network_class.__name__
    for name, value in SHRUNKEN[net].items():
        setattr(config.network, name, value)
    if getattr(config.network, "decoupled", 0):
        config.network.decoupled = 1
    if net in ("UNet", "EDM2UNet"):  # the lower of two levels
        config.network.attention_resolutions = (config.network.image_size // getattr(config.network, "patch", 1) // 2,)
    config.trajectories.steps = min(config.trajectories.steps, 8)
    return config


def rehearse(config, bf16):
    if getattr(config.objective, "distance", None) is Distance.lpips:  # has weight files, and runs in float32
        config = copy.deepcopy(config)
        config.objective.distance = Distance.l2
    with fake_cuda() as watch:
        trainer, values = fake_trainer(config, BATCH, bf16)
        weights = trainer.module.parameters()
        watch.large = max(2 * values, *(p.numel() for p in weights))
        loss = trainer.micro_step_loss(0, 0).value
    assert loss.is_cuda and loss.dtype == torch.float32 and loss.requires_grad
    assert not watch.waits
    assert set(watch.copies) <= COPIES
    assert {where for _, where in watch.wide} <= WIDE


@pytest.mark.parametrize(("name", "bf16"), list(quick_rows()))
def test_a_loss_on_cuda_neither_waits_nor_widens(name, bf16):
    rehearse(shrunken(ALL[name]), bf16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", list(ALL))
def test_every_row_at_full_size(name, bf16):
    rehearse(ALL[name], bf16)
