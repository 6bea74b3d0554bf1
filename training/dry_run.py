"""A dry run: build everything, take two steps on a few images, draw a grid."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from PIL import Image

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
        What was found, by name, and a grid: a row of the data as the network sees them, and rows of samples.

    Raises:
        UserError: Whatever ``train`` would refuse.
    """
    with within("config"):
        return _dry_run(config, batch, out)


def _dry_run(config: Config, batch: int, out: Path | None) -> tuple[dict[str, Any], Image.Image]:
    config.validate()
    number = processes().num_processes
    micro_batch = micro_batch_size(config, number)
    objective = build_objective(config)
    least = math.ceil(1 / objective.diagonal) if objective.diagonal else 1  # at least one diagonal row
    if isinstance(objective, TrajectoryObjective):
        with within("trajectories"):
            least = objective.rows(trajectory_times(config.trajectories))  # the rows of one trajectory
    small = min(micro_batch, max(1, batch // (number * config.accumulate) // least) * least)
    trainer = Trainer.build(replace(config, batch=small * number * config.accumulate))
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
    if out is not None:
        model.save_pretrained(out)
    columns = min(16, 2 * small)
    return facts, grid_image(model, config.sample_steps, config.seed, columns, trainer.data)
