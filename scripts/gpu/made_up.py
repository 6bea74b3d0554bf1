"""Data and teachers that a row needs, made up: their shapes are what time and memory depend on."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from flowmaps import FlowMap
from flowmaps.data import DataSet
from flowmaps.objectives import Objective
from training.config import Config
from training.trainer import Trainer

ITEMS = 512


@dataclass(frozen=True)
class MadeUp(DataSet):
    """Random pixels with labels; latents are stood for by images of as many channels."""

    items: Tensor
    shape: tuple[int, ...] = ()
    num_classes: int = 0

    def __len__(self) -> int:
        return 100_000

    def digest(self) -> str:
        return "made up"

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.items[index % ITEMS], index % self.num_classes if self.num_classes else None


def data_for(config: Config) -> MadeUp:
    """Return data of the shape that the network of ``config`` takes."""
    net = config.network
    shape = (net.dim,) if hasattr(net, "dim") else (net.channels, net.image_size, net.image_size)
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        items = torch.randn(ITEMS, *shape, generator=generator)
    else:
        items = torch.randint(256, (ITEMS, *shape), dtype=torch.uint8, generator=generator)
    return MadeUp(items, shape, getattr(net, "num_classes", 0))


def teacher_like(config: Config, fm: FlowMap, objective: Objective) -> FlowMap | None:
    """Return a frozen copy of ``fm`` in place of the checkpoint that ``config.teacher`` names."""
    if not config.teacher and not objective.teacher_ema:
        return None
    return copy.deepcopy(fm).requires_grad_(False).eval()


@contextmanager
def made_up_teachers() -> Iterator[None]:
    with mock.patch("training.build.build_teacher", teacher_like):
        yield


def build(config: Config) -> Trainer:
    """Build the trainer of a row without its files: random weights, data and teacher."""
    config = replace(config, init_from="", init_ema="", init_fresh=())
    config.data = replace(config.data, vae="", latent_shift=(), latent_scale=(), workers=0, download=False)
    AcceleratorState._reset_state()  # one process, several precisions
    with made_up_teachers():
        return Trainer.build(config, data_for(config))
