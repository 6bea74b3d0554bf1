"""Step sizes fitted to a model: what a few steps of a sampler lose against a fine solution, made as small as can be."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import SOLVERS, guided_label, labels_for
from flowmaps.guidance import Guided
from samplers import Schedule, heun, rollout, trajectory, uniform_times
from samplers.bellman import errors, euler_jumps, heun_jumps, map_jumps, pulled_back, solve_all
from samplers.callables import Drift


class Cost(NamedTuple):
    """What of an error counts: its norm instead of the square, and the error itself or what is left of it at data."""

    root: bool
    at_end: bool


COSTS = {
    "end": Cost(root=False, at_end=True),
    "end_root": Cost(root=True, at_end=True),
    "local": Cost(root=False, at_end=False),  # that of Nguyen et al. 2024
    "local_root": Cost(root=True, at_end=False),
}
FINE = {"euler": 96, "heun": 32, "map": 32}  # steps of the fine grid; the last two need an evaluation for each entry
COVECTORS = 4
SOLVER_JUMPS = {"euler": euler_jumps, "heun": heun_jumps}


class Fitted(NamedTuple):
    """A schedule, and the matrix of costs [N + 1, N + 1] that it was solved from."""

    schedule: Schedule
    cost: Tensor


def fit(
    fm: FlowMap,
    steps: Sequence[int],
    *,
    sampler: str | None = None,
    cost: str = "end",
    noises: int = 256,
    seed: int = 1,
    fine: int | None = None,
    guidance: float | None = None,
    batch: int = 128,
) -> Fitted:
    """The grids of ``steps`` steps for ``sampler`` (euler, heun or map; the model's own by default).

    ``noises`` paths are walked by Heun's method along ``fine`` equal steps, ``cost`` (a key of ``COSTS``) says how the
    errors of jumps between their states count, and dynamic programming picks the grids (``samplers.bellman``). Each is
    then compared with equal steps on as many other noises by the root mean square error at data, and equal steps are
    kept where they are better. The noise is that of samples at ``seed``: take another to score samples.
    """
    sampler = sampler or fm.info.sampler
    fine = fine or FINE.get(sampler, 0)
    if sampler not in FINE or fm.info.kind == "consistency":
        raise UserError(f"step sizes are for the samplers {', '.join(FINE)} of a map or a drift, not for {sampler}")
    if cost not in COSTS:
        raise UserError(f"unknown cost {cost!r}: choose one of {', '.join(COSTS)}")
    fm.info.check_sampler(sampler)
    fm.info.check_guidance(guidance, sampler)
    if not steps or min(steps) < 1 or max(steps) > fine:
        raise UserError(f"steps must be from 1 to the fine grid's {fine}, got {', '.join(map(str, steps))}")
    total = costs(fm, sampler, (cost,), noises=noises, seed=seed, fine=fine, guidance=guidance, batch=batch)[cost]
    try:
        solved = solve_all(total, max(steps))
    except ValueError as error:
        raise UserError(str(error)) from None
    drift, walk = _drift(fm, guidance), uniform_times(fine)
    grids = {count: walk[solved[count][0]] for count in steps}
    equal = {count: uniform_times(count) for count in steps}
    solutions = fine_solutions(drift, _noise(fm, noises, seed, noises, batch, guidance), fine)
    found, uniform = end_errors(fm, drift, sampler, solutions, (grids, equal))
    schedule = Schedule(
        {count: grids[count] if found[count] < uniform[count] else equal[count] for count in steps},
        sampler=sampler,
        cost=cost,
        checkpoint=fm.fingerprint(),
        noises=noises,
        seed=seed,
        fine=fine,
        guidance=guidance,
        errors=found,
        uniform_errors=uniform,
    )
    return Fitted(schedule, total)


def costs(
    fm: FlowMap,
    sampler: str,
    names: Sequence[str] = tuple(COSTS),
    *,
    noises: int = 256,
    seed: int = 1,
    fine: int | None = None,
    guidance: float | None = None,
    batch: int = 128,
) -> dict[str, Tensor]:
    """The matrix [N + 1, N + 1] of each cost in ``names``, all from one walk; arguments as in ``fit``."""
    drift, walk = _drift(fm, guidance), uniform_times(fine or FINE[sampler])
    totals = {name: torch.zeros(len(walk), len(walk), dtype=torch.float64) for name in names}
    generator = torch.Generator(next(fm.parameters()).device).manual_seed(seed)
    for x, label in _noise(fm, noises, seed, 0, batch, guidance):
        walked, weight = trajectory(drift, x, walk, label, "heun"), None
        if any(COSTS[name].at_end for name in names):
            w = torch.randn((COVECTORS, *x.shape), generator=generator, device=x.device, dtype=x.dtype)
            weight = pulled_back(drift, walked, w)
        ends = map_jumps(fm, walked) if sampler == "map" else SOLVER_JUMPS[sampler](drift, walked)
        counts = [(COSTS[name].root, weight if COSTS[name].at_end else None) for name in names]
        for name, cost in zip(names, errors(walked, ends, counts), strict=True):
            totals[name] += len(x) / noises * cost
    return totals


def _drift(fm: FlowMap, guidance: float | None) -> Drift:
    """The drift that is sampled: guided where the network does not take the weight itself."""
    if guidance is None or fm.info.guidance_max is not None:
        return fm.drift
    return Guided(fm.drift, guidance, fm.info.num_classes)


def _noise(
    fm: FlowMap, count: int, seed: int, start: int, batch: int, guidance: float | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Noise and labels of samples ``start`` .. ``start + count - 1``, as ``generate`` has them."""
    for first in range(start, start + count, batch):
        size = min(batch, start + count - first)
        x = fm.noise(size, seed, first)
        label = labels_for(fm.info, size, start=first)
        label = None if label is None else label.to(x.device)
        yield x, guided_label(fm, label, guidance if fm.info.guidance_max is not None else None)


class Solution(NamedTuple):
    """Noise [B, ...], its label, and where the fine solution from it ends."""

    noise: Tensor
    label: Tensor | None
    end: Tensor


@torch.no_grad()
def fine_solutions(
    drift: Drift, noise: Iterable[tuple[Tensor, Tensor | None]], fine: int = FINE["euler"]
) -> Iterator[Solution]:
    """Heun's method in ``fine`` equal steps along ``drift``, from batches of ``noise`` with their label."""
    for x, label in noise:
        yield Solution(x, label, heun(drift, x, uniform_times(fine), label))


@torch.no_grad()
def end_errors(
    fm: FlowMap, drift: Drift, sampler: str, solutions: Iterable[Solution], several: Sequence[dict[int, Tensor]]
) -> list[dict[int, float]]:
    """Root mean square distance at data to ``solutions`` of ``sampler`` on the grids by steps, each of ``several``."""
    walk = partial(rollout, fm) if sampler == "map" else partial(SOLVERS[sampler], drift)
    squares, count = [dict.fromkeys(grids, 0.0) for grids in several], 0
    for x, label, end in solutions:
        count += len(x)
        for found, grids in zip(squares, several, strict=True):
            for steps, times in grids.items():
                found[steps] += float((walk(x, times, label) - end).double().square().flatten(1).mean(1).sum())
    return [{steps: (total / count) ** 0.5 for steps, total in found.items()} for found in squares]


def read_schedule(file: str, flag: str) -> Schedule:
    """The schedule in ``file``, which ``flag`` names."""
    try:
        return Schedule.from_json(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{flag}={file}: {error.strerror}; schedule.py writes such files") from None
    except ValueError as error:
        raise UserError(f"{flag}={file} is no schedule of schedule.py: {error}") from None


__all__ = ["COSTS", "FINE", "Fitted", "Solution", "costs", "end_errors", "fine_solutions", "fit"]
