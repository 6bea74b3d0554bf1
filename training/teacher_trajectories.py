"""Trajectories to learn from: integrated along a teacher's drift at each step, or written to disk once."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, TrajectoryFiles
from flowmaps.data.loader import Order
from flowmaps.data.registry import as_samples
from flowmaps.data.shards import begin, complete
from flowmaps.objectives import TrajectoryObjective
from flowmaps.rng import generator
from samplers import Trajectory, check_times, log_snr_times, trajectory, uniform_times
from training.config import Config, Grid, Solver, Start, Trajectories, class_name


def grid(options: Trajectories, flag: str = "--config.trajectories.") -> Tensor:
    """The times [N + 1] that ``options`` describe, the last one 1; ``flag`` begins the flags that errors name."""
    low, high = options.low, options.high
    for name in ("steps", "substeps"):
        if getattr(options, name) < 1:
            raise UserError(f"{flag}{name} must be at least 1, got {getattr(options, name)}")
    if bool(options.times) != (options.grid is Grid.given):
        raise UserError(f"{flag}times are for {flag}grid=given, and it for them: give both or none")
    if options.grid is Grid.given:
        times = torch.tensor(options.times, dtype=torch.float64)
        try:
            check_times(times)
        except ValueError as error:
            raise UserError(f"{flag}times: {error}") from None
        if times[-1] != 1 or len(times) != options.steps + 1:
            raise UserError(f"{flag}times must be {flag}steps + 1 = {options.steps + 1} numbers that end at 1")
    elif options.grid is Grid.uniform:
        if not 0 <= low < 1:
            raise UserError(f"{flag}low must lie in [0, 1), got {low}")
        times = low + (1 - low) * uniform_times(options.steps)
    else:
        if not 0 < low < high < 1 or options.steps < 2:
            raise UserError(f"{flag}grid=log_snr needs two steps or more and 0 < low < high < 1, got {low} and {high}")
        times = torch.cat([log_snr_times(options.steps - 1, low, high), torch.ones(1, dtype=torch.float64)])
    if options.start is Start.data and not times[0] > 0:
        raise UserError(f"{flag}start=data needs a first time above 0, where the data are: {flag}low=0.006")
    return times


def parse(
    solver: str, steps: int, kind: str, low: float, high: float, times: list[str], start: str, substeps: int
) -> Trajectories:
    """The options that the flags of prepare_data.py say, checked."""
    for flag, value, choices in (("solver", solver, Solver), ("grid", kind, Grid), ("start", start, Start)):
        if value not in choices.__members__:
            raise UserError(f"--{flag}={value}: choose one of {', '.join(choices.__members__)}")
    try:
        numbers = tuple(float(time) for time in times)
    except ValueError:
        raise UserError(f"--times={','.join(times)}: give numbers, such as 0,0.3,1") from None
    options = Trajectories(Solver[solver], steps, Grid[kind], low, high, numbers, Start[start], substeps)
    grid(options, "--")
    return options


@dataclass(frozen=True)
class Walk:
    """Trajectories of ``teacher`` as ``options`` say."""

    teacher: FlowMap
    options: Trajectories

    def __post_init__(self) -> None:
        if self.options.solver is Solver.dpm_solver and self.teacher.interpolant_name != "linear":
            raise UserError("--config.trajectories.solver=dpm_solver is for the linear path: choose heun")

    def __call__(self, x0: Tensor, x1: Tensor | None = None, label: Tensor | None = None) -> Trajectory:
        """From noise ``x0`` [B, ...], and data ``x1`` [B, ...] if they start from data; no gradient is kept."""
        times, substeps = grid(self.options), self.options.substeps
        if substeps > 1:
            shares = torch.arange(substeps, dtype=times.dtype) / substeps
            times = torch.cat([torch.lerp(times[:-1, None], times[1:, None], shares).flatten(), times[-1:]])
        first = times[:1].to(x0.device, x0.dtype).expand(len(x0))
        x1 = x1 if self.options.start is Start.data else None
        x = self.teacher.interpolant.point(x0, torch.zeros_like(x0) if x1 is None else x1, first)
        return trajectory(self.teacher.drift, x, times, label, self.options.solver.name, substeps)


def described(options: Trajectories) -> dict[str, Any]:
    """What ``options`` say of how trajectories are made, ready for JSON."""
    facts = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "files"}
    return facts | {name: facts[name].name for name in ("solver", "grid", "start")} | {"times": list(options.times)}


@dataclass(frozen=True)
class Paths:
    """Trajectories for training: items of ``data`` give one each, of ``rows`` training rows."""

    data: DataSet
    times: Tensor
    rows: int
    walk: Walk | None = None  # None: the items are trajectories already

    def __call__(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Trajectory:
        """Trajectories of the items ``x`` [B, ...] with ``label`` [B] or None, the noise from ``generator``."""
        if self.walk is None:
            return Trajectory(self.times, x.transpose(0, 1), label)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.walk(self.walk.teacher.base_std * noise, x, label)


def build_paths(
    config: Config, objective: TrajectoryObjective, fm: FlowMap, teacher: FlowMap | None, data: DataSet
) -> Paths:
    """What ``config`` says of the trajectories of ``objective``."""
    options = config.trajectories
    if options.files:
        stored = TrajectoryFiles.open(options.files, "--config.trajectories.files")
        _check_files(config, fm, teacher, stored)
        fm.info = dataclasses.replace(fm.info, guidance=stored.facts["guidance"])
        return Paths(stored, stored.times, objective.rows(stored.times))
    if teacher is None:
        raise UserError(
            f"the objective {class_name(objective)} needs a teacher to walk along (--config.teacher=DIR), "
            "or trajectories that prepare_data.py has made (--config.trajectories.files=DIR)"
        )
    return Paths(data, grid(options), objective.rows(grid(options)), Walk(teacher, options))


def _check_files(config: Config, fm: FlowMap, teacher: FlowMap | None, stored: TrajectoryFiles) -> None:
    """Refuse trajectories that this run does not describe or whose path is another."""
    flag = f"--config.trajectories.files={stored.root}"
    if config.data.label_dropout or config.data.augment or config.data.flip:
        raise UserError(f"{flag}: --config.data.label_dropout, augment and flip come too late for stored trajectories")
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
        if theirs[name] != value:
            raise UserError(f"{flag} has {name} {theirs[name]}, this run {value}")
    for name, value in described(config.trajectories).items():
        made = stored.facts["made"][name]
        if made != value:
            raise UserError(f"{flag} was made with --{name}={made}, this run has --config.trajectories.{name}={value}")


def write_trajectories(
    out: Path, walk: Walk, num: int, seed: int, batch: int = 256, shard: int = 1024, data: DataSet | None = None
) -> Iterator[tuple[int, int]]:
    """Write ``num`` trajectories to the directory ``out``; yields (shards made, shards to make).

    Trajectory i has the noise of sample i at this seed, and with ``data`` (for start=data) the image at position i of
    their shuffled order and its label; otherwise its label is i mod classes. A shard that is there is kept.
    """
    teacher, options = walk.teacher, walk.options
    if (data is None) == (options.start is Start.data):
        raise UserError("trajectories start from data if and only if there are any: --start=data goes with --data=NAME")
    classes = teacher.info.num_classes
    if data is not None and (data.shape, data.num_classes if classes else 0) != (teacher.info.shape, classes):
        raise UserError(
            f"--data has samples of shape {data.shape} and {data.num_classes} classes, --teacher "
            f"{teacher.info.shape} and {classes}"
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
        "times": grid(options).tolist(),
        "made": described(options),
    }
    total = math.ceil(num / shard)
    missing = begin(out, "trajectories", facts, total)
    order = Order(len(data), seed) if data is not None else None
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
            made = walk(teacher.noise(count, seed, start=first), x1, label).states
            if not bool(torch.isfinite(made).all()):
                raise UserError(f"the trajectories {first} .. {first + count - 1} are not finite: try another grid")
            states.append(made.transpose(0, 1).float().cpu())
            labels += [] if label is None else [label.cpu()]
        return {"states": torch.cat(states).contiguous()} | ({"label": torch.cat(labels)} if labels else {}), []

    yield from complete(out, total, missing, make)


def _noise(seed: int, first: int, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Noise of items ``first``, ``first + 1``, ...: [n, ...] as ``shape``, the same for any batch size."""
    rows = [torch.randn(shape[1:], generator=generator(seed, "latents", first + i)) for i in range(shape[0])]
    return torch.stack(rows).to(device)
