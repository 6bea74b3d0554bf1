"""The rows of a file in configs/: one run, or the runs of a chain, and variants of them."""

import dataclasses
import functools
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError
from flowmaps.objectives import OBJECTIVES, TrajectoryObjective
from flowmaps.objectives.eulerian import StopGradient
from flowmaps.objectives.progressive import IntermediateTime
from flowmaps.objectives.straightening import TrainPoint
from training.config import Config, Trajectories, objective


@dataclass
class Chain:
    """Two or three runs, each from the weights of the one before: Hu et al. 2025 (arXiv 2509.24526).

    In a stage's ``init_from`` and ``teacher`` the name of a stage before it means that stage's run.
    """

    pre_training: Config | None  # a drift, by flow matching; None: it is a checkpoint
    mid_training: Config  # a map, from the drift's trajectories
    post_training: Config  # the map, by any objective

    def stages(self) -> dict[str, Config]:
        """The stages by name, in their order."""
        stages = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: config for name, config in stages.items() if config is not None}


# Rows that every config file has: objective and options by row. A file adds what learns from a teacher's paths.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, cls in OBJECTIVES.items() if not issubclass(cls, TrajectoryObjective)},
    "lagrangian_slim": ("lagrangian", {"slim": True}),
    "eulerian_slim": ("eulerian", {"stop": StopGradient.slim}),
    "progressive_uniform": ("progressive", {"middle": IntermediateTime.uniform}),
}


def method_rows(base: Callable[..., Config]) -> dict[str, Callable[[], Config]]:
    """A row for each of METHODS, from ``base(objective name, **options)``."""
    return {row: functools.partial(base, name, **options) for row, (name, options) in METHODS.items()}


def straightening_rows(base: Callable[[], Config], run: str, steps: int = 4) -> dict[str, Callable[[], Config]]:
    """The rows straightening and reflow: ``base()`` from the weights and on the paths of the drift in ``run``."""

    def row(state: TrainPoint) -> Config:
        config = base()
        config.objective = objective("straightening", steps=(steps,), state=state)
        config.init_from = config.teacher = run
        config.trajectories, config.weight.learned = Trajectories(steps=96), False
        return config

    return {"straightening": lambda: row(TrainPoint.path), "reflow": lambda: row(TrainPoint.chord)}


def select(
    choice: str,
    rows: Mapping[str, Callable[[], Config | Chain]],
    variants: Mapping[str, Callable[[Config], None]],
) -> Config | Chain:
    """What ``"row"`` or ``"row,variant"`` means in a file of configs/; a variant changes every stage of a chain."""
    row, *changes = choice.split(",")
    if row not in rows:
        raise UserError(f"unknown row {row!r}: choose one of {', '.join(rows)}")
    made = rows[row]()
    for change in changes:
        if change not in variants:
            raise UserError(f"unknown variant {change!r}: choose one of {', '.join(variants)}")
        for config in made.stages().values() if isinstance(made, Chain) else [made]:
            variants[change](config)
    return made


def load_row(file: str, choice: str) -> Config:
    """The config of one run that ``--config=file:choice`` means."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such config file (run from the repository's root)")
    made = runpy.run_path(str(path))["get_config"](choice)
    if not isinstance(made, Config):
        raise UserError(f"{choice!r} of {file} is a chain of runs: choose a row that is one")
    return made
