"""What --dry_run does: build everything, take two steps on a few images, draw a grid, guess the memory."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from training.config import Config
from training.data import ImageFiles
from training.evaluation import grid_image
from training.trainer import Trainer


def dry_run(config: Config, batch: int = 16) -> tuple[dict[str, Any], Image.Image]:
    """Two steps on at most ``batch`` images; returns (facts, picture)."""
    micro_batch = max(1, min(config.batch, batch) // config.accumulate)
    small = replace(config, batch=micro_batch * config.accumulate)
    trainer = Trainer.build(small)
    losses = [float(trainer.step(step)["loss"]) for step in range(2)]
    facts: dict[str, Any] = {"data": f"{config.data.name}, {len(trainer.data)} samples of shape {trainer.data.shape}"}
    if isinstance(trainer.data, ImageFiles):
        facts["classes"] = ", ".join(trainer.data.classes) or "none"
        facts["left out"] = ", ".join(trainer.data.left_out) or "nothing"
    facts |= {
        "parameters": sum(p.numel() for p in trainer.module.fm.network.parameters()),
        "device": str(trainer.accelerator.device),
        "loss of two steps": losses,
        "memory guess": memory_guess(trainer, config.batch),
    }
    return facts, grid_image(trainer.averaged(2), config.sample_steps, config.seed, columns=micro_batch)


def memory_guess(trainer: Trainer, batch: int) -> str:
    """A guess at a process's memory for training at a global ``batch``, after at least one step.

    What stays: weights, gradients, optimiser state, averages. What grows with the batch: the tensors that the forward
    pass keeps for the backward pass, counted in one small micro-step; a tensor that was freed within it may or may not
    be counted. Library workspaces and the data are not in it.
    """
    kept: dict[int, int] = {}  # address -> bytes

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))  # views share an address
        return tensor

    parameters = [p for p in trainer.module.parameters() if p.requires_grad]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = trainer.shard_loss(0, 0)
    for p in parameters:
        kept.pop(p.data_ptr(), None)
    del loss
    state = [v for entry in trainer.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    averages = [v for decay in trainer.ema.shadows for v in trainer.ema.state(decay).values()]
    fixed = sum(2 * p.nbytes for p in parameters) + sum(v.nbytes for v in [*state, *averages])
    shards = trainer.accelerator.num_processes * trainer.config.accumulate
    size, small = batch // shards, trainer.config.batch // shards
    growing = sum(kept.values()) * size / small
    gib = 2**30
    return (
        f"{(fixed + growing) / gib:.2f} GiB a process = {fixed / gib:.2f} GiB for weights, gradients, optimiser and "
        f"averages + {growing / gib:.2f} GiB for {size} images a micro-step"
    )
