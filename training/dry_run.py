"""What --dry_run does: build everything, take two steps on a few images, draw a grid, guess the memory."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from flowmaps import UserError
from flowmaps.data import ImageFiles
from flowmaps.distributed import processes
from flowmaps.errors import within
from flowmaps.evaluation.samples import grid_image
from flowmaps.objectives import PathObjective
from training.chain import placed
from training.config import Config, build_objective
from training.config_rows import Chain
from training.teacher_trajectories import trajectory_times
from training.trainer import Trainer, micro_batch_size


def dry_run_chain(chain: Chain, batch: int = 4) -> Iterator[tuple[str, dict[str, Any], Image.Image]]:
    """A dry run of each stage, from what that of the stage before left; yields (stage, facts, picture)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config in placed(chain, Path(folder)).items():
            AcceleratorState._reset_state()  # stages may differ in precision
            try:
                yield name, *dry_run(config, batch, Path(folder) / name)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None


def dry_run(config: Config, batch: int = 4, out: Path | None = None) -> tuple[dict[str, Any], Image.Image]:
    """Two steps on at most about ``batch`` images; returns (facts, picture), and writes the model to ``out``."""
    number = processes().num_processes
    micro_batch = micro_batch_size(config, number)
    objective = build_objective(config)
    least = math.ceil(1 / objective.diagonal) if objective.diagonal else 1  # a diagonal row has to be among them
    if isinstance(objective, PathObjective):
        with within("trajectories"):
            least = objective.rows(trajectory_times(config.trajectories))  # of a trajectory
    small = min(micro_batch, max(1, batch // (number * config.accumulate) // least) * least)
    trainer = Trainer.build(_with_micro_batch(config, small, number))
    losses = [float(trainer.step(step)["loss"]) for step in range(2)]
    facts: dict[str, Any] = {"data": f"{config.data.name}, {len(trainer.data)} samples of shape {trainer.data.shape}"}
    if isinstance(trainer.data, ImageFiles):
        facts["classes"] = ", ".join(trainer.data.classes) or "none"
        facts["left out"] = ", ".join(trainer.data.left_out) or "nothing"
    facts |= {
        "parameters": sum(p.numel() for p in trainer.module.fm.network.parameters()),
        "device": str(trainer.accelerator.device),
        "loss of two steps": losses,
    }
    model = trainer.averaged(2)
    fixed, kept = fixed_bytes(trainer), {small: kept_bytes(trainer)}
    del trainer  # two at once may not fit where one does
    kept[2 * small] = kept_bytes(Trainer.build(_with_micro_batch(config, 2 * small, number)))
    again = ", without what is computed again" * config.gradient_checkpointing
    facts["memory guess"] = memory_guess(fixed, kept, micro_batch) + again
    if out is not None:
        model.save_pretrained(out)
    return facts, grid_image(model, config.sample_steps, config.seed, columns=min(16, 2 * small))


def _with_micro_batch(config: Config, size: int, processes: int) -> Config:
    return replace(config, batch=size * processes * config.accumulate)


def memory_guess(fixed: int, kept: dict[int, int], size: int) -> str:
    """A guess at a process's memory for micro-batches of ``size``, from what two smaller ones ``kept``.

    What stays are the ``fixed`` bytes; what grows, the tensors that the forward pass keeps for the backward pass, is on
    a straight line through those two. Library workspaces and the data are not in it.
    """
    (one, few), (two, more) = kept.items()
    growing = max(0.0, few + (more - few) / (two - one) * (size - one))
    gib = 2**30
    return (
        f"{(fixed + growing) / gib:.2f} GiB a process = {fixed / gib:.2f} GiB for weights, gradients, optimiser and "
        f"averages + {growing / gib:.2f} GiB for {size} images a micro-step"
    )


def fixed_bytes(trainer: Trainer) -> int:
    """Bytes of weights, gradients, averages, a teacher, and the state of an optimiser that has made a step."""
    state = [v for entry in trainer.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    averages = [v for shadow in trainer.ema.shadows.values() for v in shadow.values()]
    weights = [p for p in trainer.module.parameters() if p.requires_grad]
    teacher = [] if trainer.module.teacher is None else list(trainer.module.teacher.parameters())
    return sum(2 * p.nbytes for p in weights) + sum(v.nbytes for v in [*state, *averages, *teacher])


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that the forward pass of one micro-step keeps; a tensor freed within it may or may not be counted."""
    kept: dict[int, int] = {}  # address -> bytes

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))  # views share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = trainer.shard_loss(0, 0)
    for p in trainer.module.parameters():
        kept.pop(p.data_ptr(), None)
    del loss
    return sum(kept.values())
