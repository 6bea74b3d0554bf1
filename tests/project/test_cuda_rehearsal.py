"""The loss of every config row on fake CUDA tensors: what a GPU would refuse, wait for or widen to float32."""

import copy
import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from helpers.fake_cuda import fake_cuda

from flowmaps.data import Latents
from flowmaps.objectives import Lagrangian, LogVariance, TrajectoryObjective
from flowmaps.objectives.mid_training import Distance
from training.build import build_flow_map
from training.config import build_objective
from training.config_rows import Chain
from training.loss_module import LossModule
from training.precision import step_precision
from training.teacher_trajectories import TrajectorySolver, TrajectorySource, trajectory_times
from training.trainer import Trainer

BATCH = 512  # more numbers in an activation than in a shrunken network's weight
SHRUNKEN = {
    "MLP": {"width": 32, "depth": 2},
    "UNet": {"width": 32, "blocks": 1, "channel_mult": (1, 2)},
    "EDM2UNet": {"width": 32, "blocks": 1, "channel_mult": (1, 2)},
    "DiT": {"width": 96, "depth": 2, "heads": 2},
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
WIDE = {"flowmaps.networks.mlp.MLP.forward"}  # features of float32 points, larger than the points


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
    if net in ("UNet", "EDM2UNet"):  # the lower of two levels
        config.network.attention_resolutions = (config.network.image_size // getattr(config.network, "patch", 1) // 2,)
    config.trajectories.steps = min(config.trajectories.steps, 8)
    return config


def micro_step_loss(config, bf16):
    """Return what a micro-step of ``config`` does on fake CUDA tensors, draws and transfers included."""
    net, objective, device = config.network, build_objective(config), torch.device("cuda")
    image = not hasattr(net, "dim")
    shape = (net.channels, net.image_size, net.image_size) if image else (net.dim,)
    classes = getattr(net, "num_classes", 0)
    with fake_cuda() as watch:
        with device:
            fm = build_flow_map(config, shape, classes)
            weight = LogVariance(limit=config.weight.limit) if config.weight.learned else None
            teacher = build_flow_map(config, shape, classes) if config.teacher or objective.teacher_ema else None
        module = LossModule(fm, objective, weight, teacher)
        paths, rows = None, 1
        if isinstance(objective, TrajectoryObjective):
            times = trajectory_times(config.trajectories)
            rows = objective.rows(times)
            paths = TrajectorySource(None, times, rows, TrajectorySolver(teacher, config.trajectories))
        items = math.ceil(BATCH / rows)
        data = None
        x = torch.zeros(items, *shape, dtype=torch.uint8 if image else torch.float32)
        if image and net.channels == 4:
            facts = {"shape": shape, "latent_shift": 4 * (0.0,), "latent_scale": 4 * (0.18,)}
            data = Latents(Path(), facts, [items])
            x = torch.zeros(items, 2, *shape, dtype=torch.float16)
        label = torch.arange(items) % classes if classes else None

        def wrapped(*args):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                return module(*args)

        accelerator = SimpleNamespace(device=device, process_index=0)
        loader = SimpleNamespace(batch=lambda k: (x, label))
        precision = step_precision(config, objective, device)
        trainer = Trainer(config, data, loader, accelerator, module, wrapped, None, None, precision, paths=paths)
        watch.large = max(2 * items * rows * math.prod(shape), *(p.numel() for p in module.parameters()))
        loss = trainer.micro_step_loss(0, 0)
        assert loss.value.is_cuda and loss.value.dtype == torch.float32 and loss.value.requires_grad
    return watch.seen


def rehearse(config, bf16):
    if getattr(config.objective, "distance", None) is Distance.lpips:  # has weight files, and runs in float32
        config = copy.deepcopy(config)
        config.objective.distance = Distance.l2
    seen = micro_step_loss(config, bf16)
    assert not seen.waits
    assert set(seen.copies) <= COPIES
    assert {where for _, where in seen.wide} <= WIDE


@pytest.mark.parametrize(("name", "bf16"), list(quick_rows()))
def test_a_loss_on_cuda_neither_waits_nor_widens(name, bf16):
    rehearse(shrunken(ALL[name]), bf16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", list(ALL))
def test_every_row_at_full_size(name, bf16):
    rehearse(ALL[name], bf16)
