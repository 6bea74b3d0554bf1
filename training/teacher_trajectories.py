"""Trajectories to train on: solved along a teacher's drift at each step, or written to disk once."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap
from flowmaps.data import DataSet, ShuffledOrder, TrajectoryFiles, as_samples
from flowmaps.data.shard_writing import check_directory, check_shard, start_writing, write_missing
from flowmaps.errors import UserError, blame, within
from flowmaps.objectives import TrajectoryObjective
from flowmaps.rng import generator
from samplers import SAMPLERS, Trajectory, check_times, log_snr_times, trajectory, uniform_times
from training.config import Config, Grid, Start, Trajectories, class_name

MOST_STEPS = 10_000


def trajectory_times(options: Trajectories) -> Tensor:
    """Return the times [N + 1] that ``options`` describe; the last one is 1.

    Raises:
        UserError: The options contradict each other. The field is relative to ``options``.
    """
    low, high = options.low, options.high
    for name in ("steps", "substeps"):
        if not 1 <= getattr(options, name) <= MOST_STEPS:
            raise UserError(f"must lie in 1 .. {MOST_STEPS:,}", field=name, value=getattr(options, name))
    if bool(options.times) != (options.grid is Grid.given):
        raise UserError("times requires grid=given, and grid=given requires times", field="times")
    if options.grid is Grid.given:
        times = torch.tensor(options.times, dtype=torch.float64)
        try:
            check_times(times)
        except ValueError as error:
            raise UserError(str(error), field="times") from None
        if times[-1] != 1 or len(times) != options.steps + 1:
            raise UserError(f"must be steps + 1 = {options.steps + 1} numbers that end at 1", field="times")
    elif options.grid is Grid.uniform:
        if not 0 <= low < 1:
            raise UserError("must lie in [0, 1)", field="low", value=low)
        times = low + (1 - low) * uniform_times(options.steps)
    else:
        if not 0 < low < high < 1 or options.steps < 2:
            raise UserError(
                f"needs at least 2 steps and 0 < low < high < 1, got steps={options.steps}, low={low} and high={high}",
                field="grid",
                value="log_snr",
            )
        times = torch.cat([log_snr_times(options.steps - 1, low, high), torch.ones(1, dtype=torch.float64)])
    if options.start is Start.data and not times[0] > 0:
        field = "times" if options.grid is Grid.given else "low"
        raise UserError("start=data needs a first time above 0, e.g. 0.006", field=field)
    return times


@dataclass(frozen=True)
class TrajectorySolver:
    """Solves for trajectories along the drift of ``teacher``."""

    teacher: FlowMap
    options: Trajectories

    def __post_init__(self) -> None:
        if SAMPLERS[self.options.solver.name].linear and self.teacher.interpolant_name != "linear":
            reason = "requires the linear interpolant: choose heun"
            raise UserError(reason, field="solver", value=self.options.solver.name)

    def __call__(self, x0: Tensor, x1: Tensor | None = None, label: Tensor | None = None) -> Trajectory:
        """Start from noise ``x0`` [B, ...] and, with start=data, data ``x1`` [B, ...]; no gradient is kept."""
        times, substeps = trajectory_times(self.options), self.options.substeps
        if substeps > 1:
            shares = torch.arange(substeps, dtype=times.dtype) / substeps
            times = torch.cat([torch.lerp(times[:-1, None], times[1:, None], shares).flatten(), times[-1:]])
        first = times[:1].to(x0.device, x0.dtype, non_blocking=True).expand(len(x0))
        x1 = x1 if self.options.start is Start.data else None
        x = self.teacher.interpolant.point(x0, torch.zeros_like(x0) if x1 is None else x1, first)
        return trajectory(self.teacher.drift, x, times, label, self.options.solver.name, substeps)


def to_dict(options: Trajectories) -> dict[str, Any]:
    """Return ``options``, except ``files``, ready for JSON."""
    facts = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "files"}
    return facts | {name: facts[name].name for name in ("solver", "grid", "start")} | {"times": list(options.times)}


@dataclass(frozen=True)
class TrajectorySource:
    """Makes one trajectory, which gives ``rows`` training rows, from each item of ``data``."""

    data: DataSet
    times: Tensor
    rows: int
    solver: TrajectorySolver | None = None  # None: the items are trajectories already

    def __call__(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Trajectory:
        """Return the trajectories of the items ``x`` [B, ...] with ``label`` [B] or None; noise from ``generator``."""
        if self.solver is None:
            return Trajectory(self.times, x.transpose(0, 1), label)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.solver(self.solver.teacher.base_std * noise, x, label)


def build_trajectory_source(
    config: Config, objective: TrajectoryObjective, fm: FlowMap, teacher: FlowMap | None, data: DataSet
) -> TrajectorySource:
    """Build the source of trajectories for ``objective``; ``fm`` takes over the guidance of stored ones."""
    options = config.trajectories
    if options.files:
        with blame("trajectories.files", options.files):
            stored = TrajectoryFiles.open(options.files)
        _check_files(config, fm, teacher, stored)
        fm.info = dataclasses.replace(fm.info, guidance=stored.facts["guidance"])
        return TrajectorySource(stored, stored.times, objective.rows(stored.times))
    if teacher is None:
        raise UserError(
            f"the objective {class_name(objective)} needs a teacher to solve along (teacher=DIR), or trajectories "
            "written by prepare_data.py (trajectories.files=DIR)",
            field="teacher",
        )
    with within("trajectories"):
        times, solver = trajectory_times(options), TrajectorySolver(teacher, options)
    return TrajectorySource(data, times, objective.rows(times), solver)


def _check_files(config: Config, fm: FlowMap, teacher: FlowMap | None, stored: TrajectoryFiles) -> None:
    """Refuse stored trajectories that do not fit the run."""
    where: dict[str, Any] = {"field": "trajectories.files", "value": stored.root}
    if config.data.label_dropout or config.data.augment or config.data.flip:
        raise UserError(
            "data.label_dropout, data.augment and data.flip cannot be applied to stored trajectories", **where
        )
    if fm.info.condition:
        raise UserError("holds no conditions, which this run needs: solve during training", **where)
    ours: dict[str, Any] = {
        "samples of shape": fm.info.shape,
        "num_classes": fm.info.num_classes,
        "interpolant": fm.interpolant_name,
        "base_std": fm.base_std,
    }
    theirs: dict[str, Any] = {**stored.facts, "samples of shape": stored.shape}
    if teacher is not None:
        ours["teacher"] = teacher.fingerprint()
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(f"has {name} {theirs.get(name)}, this run {value}", **where)
    for name, value in to_dict(config.trajectories).items():
        made = stored.facts["made"].get(name)
        if made != value:
            raise UserError(f"was made with {name}={made}, this run has trajectories.{name}={value}", **where)


def write_trajectories(
    out: str | Path,
    solver: TrajectorySolver,
    num: int,
    seed: int,
    batch: int = 256,
    shard: int = 1024,
    data: DataSet | None = None,
) -> Iterator[tuple[int, int]]:
    """Write trajectories to disk, for training to read.

    Trajectory i starts from the noise of sample i at this seed. With ``data`` (for start=data) it has the image and
    label at position i of the data's shuffled order; otherwise its label is i mod classes.

    Args:
        out: Directory of the set; one that was started with the same arguments is completed.
        solver: The teacher and how it is solved.
        num: Number of trajectories.
        seed: Seed of the noise and of the data's order.
        batch: Trajectories solved at a time.
        shard: Trajectories per file.
        data: Data set to start from.

    Yields:
        (shards made, shards to make) by this process, first before any work and then after each shard.

    Raises:
        UserError: ``data`` does not fit the teacher or ``start``, ``out`` holds another set, or a trajectory is not
            finite.
    """
    teacher, options = solver.teacher, solver.options
    check_directory(Path(out), "trajectories")
    check_shard(shard, 4 * (options.steps + 1) * math.prod(teacher.info.shape))
    if (data is None) == (options.start is Start.data):
        raise UserError("start=data requires data, and data requires start=data", "start", options.start.name)
    if teacher.info.condition:
        raise UserError("the teacher needs conditions, which are not stored: solve during training", field="teacher")
    classes = teacher.info.num_classes
    if data is not None and (data.shape, data.num_classes if classes else 0) != (teacher.info.shape, classes):
        raise UserError(
            f"has samples of shape {data.shape} and {data.num_classes} classes, the teacher {teacher.info.shape} and "
            f"{classes}",
            field="data",
        )
    facts: dict[str, Any] = {
        "num": num,
        "shard": shard,
        "shape": list(teacher.info.shape),
        "num_classes": classes,
        "interpolant": teacher.interpolant_name,
        "base_std": teacher.base_std,
        "teacher": teacher.fingerprint(),
        "guidance": teacher.info.guidance,
        "data": data.digest() if data is not None else "",
        "seed": seed,
        "times": trajectory_times(options).tolist(),
        "made": to_dict(options),
    }
    writing = start_writing(out, "trajectories", facts, math.ceil(num / shard))
    order = ShuffledOrder(len(data), seed) if data is not None else None
    device = next(teacher.parameters()).device

    def make(number: int) -> tuple[dict[str, Tensor], list[str]]:
        states, labels = [], []
        stop = min((number + 1) * shard, num)
        for first in range(number * shard, stop, batch):
            count = min(batch, stop - first)
            x1, label = None, torch.arange(first, first + count) % classes if classes else None
            if data is not None and order is not None:
                x1, given = data.fetch(order.indices(first, count))
                x1 = as_samples(data, x1.to(device), partial(_noise, seed, first, device))
                label = given if classes else None
            label = None if label is None else label.to(device)
            made = solver(teacher.noise(count, seed, start=first), x1, label).states
            if not bool(torch.isfinite(made).all()):
                raise UserError(f"the trajectories {first} .. {first + count - 1} are not finite: try another grid")
            states.append(made.transpose(0, 1).float().cpu())
            labels += [] if label is None else [label.cpu()]
        return {"states": torch.cat(states).contiguous()} | ({"label": torch.cat(labels)} if labels else {}), []

    yield from write_missing(writing, make)


def _noise(seed: int, first: int, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Draw noise of ``shape`` [n, ...] for items ``first``, ``first + 1``, ...: the same for any batch size."""
    rows = [torch.randn(shape[1:], generator=generator(seed, "latents", first + i)) for i in range(shape[0])]
    return torch.stack(rows).to(device)
