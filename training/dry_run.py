"""A dry run: build everything, take two steps on a few images, draw a grid, estimate the memory."""

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

from flowmaps.data import ImageFiles
from flowmaps.distributed import processes
from flowmaps.errors import within
from flowmaps.evaluation.samples import grid_image
from flowmaps.objectives import TrajectoryObjective
from training.build import micro_batch_size
from training.chain import placed
from training.config import Config, build_objective
from training.config_rows import Chain
from training.teacher_trajectories import trajectory_times
from training.trainer import Trainer


def dry_run_chain(chain: Chain, batch: int = 4) -> Iterator[tuple[str, dict[str, Any], Image.Image]]:
    """Do a dry run of each stage, starting from the result of the previous one; yields (stage, facts, picture)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config in placed(chain, Path(folder)).items():
            AcceleratorState._reset_state()  # stages may differ in precision
            with within(f"config.{name}"):
                result = _dry_run(config, batch, Path(folder) / name)
            yield name, *result


def dry_run(config: Config, batch: int = 4, out: Path | None = None) -> tuple[dict[str, Any], Image.Image]:
    """Take two steps on about ``batch`` images at most.

    Args:
        config: The run.
        batch: Images per step; more where an objective needs more rows.
        out: Directory for the exported model, if any.

    Returns:
        What was found, by name, and a grid of samples.

    Raises:
        UserError: Whatever ``train`` would refuse.
    """
    with within("config"):
        return _dry_run(config, batch, out)


def _dry_run(config: Config, batch: int, out: Path | None) -> tuple[dict[str, Any], Image.Image]:
    number = processes().num_processes
    micro_batch = micro_batch_size(config, number)
    objective = build_objective(config)
    least = math.ceil(1 / objective.diagonal) if objective.diagonal else 1  # at least one diagonal row
    if isinstance(objective, TrajectoryObjective):
        with within("trajectories"):
            least = objective.rows(trajectory_times(config.trajectories))  # the rows of one trajectory
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
    again = ", without recomputed activations" * config.gradient_checkpointing
    facts["memory guess"] = memory_guess(fixed, kept, micro_batch) + again
    if out is not None:
        model.save_pretrained(out)
    return facts, grid_image(model, config.sample_steps, config.seed, columns=min(16, 2 * small))


def _with_micro_batch(config: Config, size: int, processes: int) -> Config:
    return replace(config, batch=size * processes * config.accumulate)


def memory_guess(fixed: int, kept: dict[int, int], size: int) -> str:
    """Estimate the memory of one process for micro-batches of ``size``, from the bytes that two smaller ones ``kept``.

    To the ``fixed`` bytes come the tensors that the forward pass keeps for the backward pass, extrapolated linearly.
    Library workspaces and the data are not included.
    """
    (one, few), (two, more) = kept.items()
    growing = max(0.0, few + (more - few) / (two - one) * (size - one))
    gib = 2**30
    return (
        f"{(fixed + growing) / gib:.2f} GiB per process = {fixed / gib:.2f} GiB for weights, gradients, optimiser and "
        f"averages + {growing / gib:.2f} GiB for {size} images per micro-step"
    )


def fixed_bytes(trainer: Trainer) -> int:
    """Count the bytes of weights, gradients, averages, teacher, and the state of an optimiser that has made a step."""
    state = [v for entry in trainer.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    averages = [v for shadow in trainer.ema.shadows.values() for v in shadow.values()]
    weights = [p for p in trainer.module.parameters() if p.requires_grad]
    teacher = [] if trainer.module.teacher is None else list(trainer.module.teacher.parameters())
    return sum(2 * p.nbytes for p in weights) + sum(v.nbytes for v in [*state, *averages, *teacher])


def kept_bytes(trainer: Trainer) -> int:
    """Count the bytes that the forward pass of one micro-step keeps; tensors freed within it may be counted too."""
    kept: dict[int, int] = {}  # address -> bytes

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))  # views share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = trainer.micro_step_loss(0, 0)
    for p in trainer.module.parameters():
        kept.pop(p.data_ptr(), None)
    del loss
    return sum(kept.values())
