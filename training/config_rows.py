"""Rows and variants of the files in configs/, and what these files share.

This is not a file of configs/ itself, so that a config file anywhere can import it.
"""

import dataclasses
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError, choose
from flowmaps.objectives import (
    OBJECTIVES,
    Eulerian,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    Objective,
    Progressive,
    Straightening,
    TrajectoryObjective,
)
from flowmaps.objectives.eulerian import StopGradient
from flowmaps.objectives.progressive import IntermediateTime
from flowmaps.objectives.straightening import TrainPoint
from flowmaps.objectives.time_sampling import DiagonalDraw
from training.config import Config, DropoutRows, Optim, Optimizer, Precision, Trajectories, Weight


@dataclass
class Chain:
    """Two or three runs, each from the weights of the one before: Hu et al. 2025 (arXiv 2509.24526).

    In a stage's ``init_from`` and ``teacher``, the name of an earlier stage stands for that stage's run.
    """

    pre_training: Config | None  # a drift, by flow matching; None: the drift is an existing checkpoint
    mid_training: Config  # a map, from the drift's trajectories
    post_training: Config  # the map, by any objective

    def stages(self) -> dict[str, Config]:
        """Return the stages by name, in order."""
        stages = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: config for name, config in stages.items() if config is not None}


# Rows that config files have in common. A file adds those that learn from a teacher's trajectories.
METHODS: dict[str, Callable[[], Objective]] = {
    **{name: cls for name, cls in OBJECTIVES.items() if not issubclass(cls, TrajectoryObjective)},
    "lagrangian_slim": partial(Lagrangian, slim=True),
    "eulerian_slim": partial(Eulerian, stop=StopGradient.slim),
    "progressive_uniform": partial(Progressive, middle=IntermediateTime.uniform),
}


def objective_configs(base: Callable[[Objective], Config]) -> dict[str, Callable[[], Config]]:
    """Return a row for each of METHODS: ``base`` of its objective."""
    return {row: partial(lambda make: base(make()), make) for row, make in METHODS.items()}


def straightening_configs(base: Callable[[], Config], run: str, steps: int = 4) -> dict[str, Callable[[], Config]]:
    """Return the rows straightening and reflow: ``base()`` with weights and trajectories of the drift in ``run``."""

    def row(state: TrainPoint) -> Config:
        config = base()
        config.objective = Straightening(steps=(steps,), state=state)
        config.init_from = config.teacher = run
        config.trajectories, config.weight.learned = Trajectories(steps=96), False
        return config

    return {"straightening": lambda: row(TrainPoint.path), "reflow": lambda: row(TrainPoint.chord)}


def decouple(config: Config, blocks: int) -> None:
    """Make ``config``, whose network is a DiT, a run of DMF: decoupled MeanFlow (arXiv 2510.24474), guided by 2.5.

    The first ``blocks`` of the network know s alone.
    """
    objective = MeanFlow(
        diagonal=0.5, time_mean=(-0.4, 1.2, 0.0), time_std=(1.0, 1.0, 1.0), diagonal_draw=DiagonalDraw.own
    )
    objective.guidance, objective.guidance_mix, objective.guidance_times = 2.5, 0.6, (0.3, 1.0)
    config.objective, config.data.label_dropout, config.network.decoupled = objective, 0.1, blocks
    config.weight = Weight(learned=True, limit=20.0, log_floor=0.01)


def improve(config: Config) -> ImprovedMeanFlow:
    """Make ``config`` a run of improved MeanFlow as published (arXiv 2512.02012), and return the objective.

    Half of the rows are diagonal, and they alone lose their label; c of the adaptive weight is 0.01; weights have a
    density 1 / w on [1, 8], as in the authors' file for their B/2; gradients are not clipped.
    """
    objective = ImprovedMeanFlow(diagonal=0.5, adaptive=1.0, guidance_max=8.0, guidance_interval=True)
    config.objective = objective
    config.network.guidance = config.network.guidance_interval = True
    config.data.label_dropout, config.data.dropout_rows = 0.1, DropoutRows.diagonal
    config.optim.clip = 0.0
    return objective


def pixels(
    config: Config, time_mean: float = -0.8, power: float = 1.0, uniform: float = 0.0, after: float = 0.2
) -> None:
    """Make ``config``, whose network is an IMFDiT, a run of pixel MeanFlow as published (arXiv 2601.22158).

    ``perceptual`` adds its perceptual terms, in rows with s > ``after``. Both times have logits (``time_mean``, 0.8),
    or in a share ``uniform`` of the rows are uniform, and a diagonal row draws one; guidance weights have a density 1 /
    w^``power``: the defaults are those of the files of B. Muon at 1e-3, without warm-up or clipping, and beside it Adam
    with Nesterov momentum.
    """
    objective = improve(config)
    objective.time_mean, objective.time_std = (time_mean, time_mean), (0.8, 0.8)
    objective.diagonal_draw, objective.end_floor, objective.guidance_power = DiagonalDraw.single, 0.05, power
    objective.uniform_share, objective.perceptual_after = uniform, after
    config.network.prediction, config.network.rotation = "data", "grid"
    config.optim = Optim(name=Optimizer.muon, lr=1e-3, betas=(0.9, 0.95), nesterov=True, warmup=0, clip=0.0)


def perceptual(config: Config) -> None:
    """Add the perceptual terms of pixel MeanFlow with their published weights; the networks' files are flags."""
    if not isinstance(config.objective, ImprovedMeanFlow):
        raise UserError("the variant perceptual is for rows of improved_mean_flow, such as pmf")
    config.objective.lpips, config.objective.convnext = 0.4, 0.1


def smoke(config: Config, batch: int = 16, trajectory_steps: int | None = None, **network: Any) -> None:
    """Shrink a run to seconds on two cores, where every part runs and nothing is learned.

    ``network`` are arguments of a small network, as far as the row's has them; ``trajectory_steps`` limits the length
    of trajectories.
    """
    for name, value in network.items():
        if hasattr(config.network, name):
            setattr(config.network, name, value)
    if getattr(config.network, "decoupled", 0):
        config.network.decoupled = config.network.depth // 2
    if hasattr(config.network, "head_depth"):
        config.network.head_depth, config.network.hidden = (config.network.depth + 1) // 2, 0
    config.steps, config.batch, config.precision = 20, batch, Precision.fp32
    config.data.workers = min(config.data.workers, 1)
    if trajectory_steps is not None:
        config.trajectories.steps = min(config.trajectories.steps, trajectory_steps)
    config.log_every = config.sample_every = config.checkpoint_every = 5


def distil_init(config: Config) -> None:
    """Use the checkpoint that the run starts from, frozen, as teacher of the off-diagonal term."""
    config.teacher = config.init_from


def select(
    choice: str,
    rows: Mapping[str, Callable[[], Config | Chain]],
    variants: Mapping[str, Callable[[Config], None]],
) -> Config | Chain:
    """Build ``"row"`` or ``"row,variant"`` of a config file; a variant changes every stage of a chain."""
    row, *changes = choice.split(",")
    if row in variants and row not in rows:
        raise UserError(f"{row!r} is a variant: name a row before it, such as {next(iter(rows))},{row}")
    if row not in rows:
        raise UserError(f"unknown row {row!r}: {choose(row, rows)}")
    made = rows[row]()
    for change in changes:
        if change not in variants:
            raise UserError(f"unknown variant {change!r}: {choose(change, variants)}")
        for config in made.stages().values() if isinstance(made, Chain) else [made]:
            variants[change](config)
    return made


def load_row(file: str, choice: str) -> Config:
    """Load the config of one run, as ``--config=file:choice`` does."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such config file: run this in the root of the repository")
    made = runpy.run_path(str(path))["get_config"](choice)
    if not isinstance(made, Config):
        raise UserError(f"{choice!r} of {file} is a chain of runs: choose a row that is a single run")
    return made
