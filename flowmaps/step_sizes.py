"""Fit step sizes to a model: few steps of a sampler that end as close as possible to a fine solution."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowmaps.errors import UserError, blame
from flowmaps.flow_map import FlowMap
from flowmaps.generate import check_sampling, guided_drift, guided_label
from flowmaps.labels import labels_for
from flowmaps.reading import read_json
from samplers import SAMPLERS, Schedule, Trajectory, heun, trajectory, uniform_times
from samplers.bellman import Endpoints, errors, euler_endpoints, heun_endpoints, map_endpoints, solve_all, vjp_to_end
from samplers.callables import Drift
from samplers.grids import is_step_count


class Cost(NamedTuple):
    """The measure of the error of one step: norm or squared norm, locally or propagated to t = 1."""

    sqrt: bool
    propagate: bool


COSTS = {
    "end": Cost(sqrt=False, propagate=True),
    "end_root": Cost(sqrt=True, propagate=True),
    "local": Cost(sqrt=False, propagate=False),  # Nguyen et al. 2024
    "local_root": Cost(sqrt=True, propagate=False),
}
# Samplers that step sizes can be fitted to: steps of the fine grid by default, and endpoints of all single steps.
FINE = {"euler": 96, "heun": 32, "map": 32}  # heun and map need an evaluation for each entry of the cost matrix
ENDPOINTS: dict[str, Callable[[Any, Trajectory], Endpoints]] = {
    "euler": euler_endpoints,
    "heun": heun_endpoints,
    "map": map_endpoints,
}
NUM_PROBES = 4
FINEST = 1024  # steps of a fine grid; the cost matrix is of this size
UNFIT = f"step sizes are for the samplers {', '.join(FINE)} of a map or a drift"


class FittedSchedule(NamedTuple):
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
) -> FittedSchedule:
    """Fit time grids for a sampler of ``fm`` by dynamic programming (``samplers.bellman``).

    Heun's method integrates ``noises`` paths in ``fine`` equal steps; the errors of single steps between their states
    give the costs. Each grid is then compared with equal steps on as many other noises by the root mean square error
    at data, and equal steps are kept where they are better.

    Args:
        fm: The model, on the device to work on.
        steps: The numbers of steps to fit grids for.
        sampler: euler, heun or map; None takes the model's own.
        cost: A key of ``COSTS``: how an error counts.
        noises: The number of paths.
        seed: The seed of their noise. Samples that are to be scored need another seed.
        fine: Steps of the fine grid, from which all times are taken; None takes the value in ``FINE``.
        guidance: The guidance weight that will be sampled with.
        batch: Paths at a time.

    Returns:
        The schedule, and the matrix of costs float64 [fine + 1, fine + 1].

    Raises:
        UserError: The sampler cannot be fitted or is not for this model, an argument is out of range, or the drift
            diverges.

    Example:
        >>> schedule = fit(fm, [2, 4], sampler="euler").schedule
        >>> samples = generate(fm, schedule[4], n=16, seed=0, sampler="euler")
    """
    sampler = sampler or ("map" if fm.info.kind == "map" else fm.info.sampler)
    check_choices(steps, None if fm.info.kind == "consistency" else sampler, cost, fine)
    if fm.info.kind == "consistency":
        raise UserError(UNFIT, "sampler", sampler)
    check_sampling(fm, sampler, guidance=guidance)
    fine = fine or FINE[sampler]
    total = costs(fm, sampler, (cost,), noises=noises, seed=seed, fine=fine, guidance=guidance, batch=batch)[cost]
    try:
        solved = solve_all(total, max(steps))
    except ValueError as error:
        raise UserError(str(error)) from None
    drift, walk = guided_drift(fm, guidance), uniform_times(fine)
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
    return FittedSchedule(schedule, total)


def check_choices(steps: Sequence[int], sampler: str | None, cost: str, fine: int | None) -> None:
    """Refuse arguments of ``fit`` that suit no model; ``sampler`` None is that of a model not known yet."""
    if sampler is not None and sampler not in FINE:
        raise UserError(UNFIT, "sampler", sampler)
    if cost not in COSTS:
        raise UserError(f"choose one of {', '.join(COSTS)}", field="cost", value=cost)
    if fine is not None and not 1 <= fine <= FINEST:
        raise UserError(f"must be from 1 to {FINEST} steps", field="fine", value=fine)
    most = fine or (FINE[sampler] if sampler else max(FINE.values()))
    if not steps or not all(map(is_step_count, steps)) or max(steps) > most or len(set(steps)) < len(steps):
        counts = ",".join(map(str, steps))
        raise UserError(f"must be different, from 1 to the {most} steps of the fine grid", "steps", counts)


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
    """Return the matrix [N + 1, N + 1] of each cost in ``names``, all from the same paths; arguments as in ``fit``."""
    drift, walk = guided_drift(fm, guidance), uniform_times(fine or FINE[sampler])
    totals = {name: torch.zeros(len(walk), len(walk), dtype=torch.float64) for name in names}
    generator = torch.Generator(next(fm.parameters()).device).manual_seed(seed)
    for x, label in _noise(fm, noises, seed, 0, batch, guidance):
        walked, weight = trajectory(drift, x, walk, label, "heun"), None
        if any(COSTS[name].propagate for name in names):
            w = torch.randn((NUM_PROBES, *x.shape), generator=generator, device=x.device, dtype=x.dtype)
            weight = vjp_to_end(drift, walked, w)
        ends = ENDPOINTS[sampler](_model(fm, drift, sampler), walked)
        counts = [(COSTS[name].sqrt, weight if COSTS[name].propagate else None) for name in names]
        for name, cost in zip(names, errors(walked, ends, counts), strict=True):
            totals[name] += len(x) / noises * cost
    return totals


def _model(fm: FlowMap, drift: Drift, sampler: str) -> FlowMap | Drift:
    return fm if SAMPLERS[sampler].of == "map" else drift


def _noise(
    fm: FlowMap, count: int, seed: int, start: int, batch: int, guidance: float | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield noise and labels of samples ``start`` .. ``start + count - 1``, the same as in ``generate``."""
    for first in range(start, start + count, batch):
        size = min(batch, start + count - first)
        x = fm.noise(size, seed, first)
        label = labels_for(fm.info, size, fm.conditions, start=first)
        yield x, guided_label(fm, None if label is None else label.to(x.device), guidance)


class Solution(NamedTuple):
    """Noise [B, ...], its label, and the end of the fine solution from it."""

    noise: Tensor
    label: Tensor | None
    end: Tensor


@torch.no_grad()
def fine_solutions(
    drift: Drift, noise: Iterable[tuple[Tensor, Tensor | None]], fine: int = FINE["euler"]
) -> Iterator[Solution]:
    """Yield the solutions of Heun's method in ``fine`` equal steps from batches of ``noise`` with labels."""
    for x, label in noise:
        yield Solution(x, label, heun(drift, x, uniform_times(fine), label))


@torch.no_grad()
def end_errors(
    fm: FlowMap, drift: Drift, sampler: str, solutions: Iterable[Solution], several: Sequence[dict[int, Tensor]]
) -> list[dict[int, float]]:
    """Return the root mean square distance of ``sampler`` from ``solutions`` at data, by steps, for several grids."""
    run, model = SAMPLERS[sampler].run, _model(fm, drift, sampler)
    squares, count = [dict.fromkeys(grids, 0.0) for grids in several], 0
    for x, label, end in solutions:
        count += len(x)
        for found, grids in zip(squares, several, strict=True):
            for steps, times in grids.items():
                distance = (run(model, x, times, label) - end).double()
                found[steps] += float(distance.square().flatten(1).mean(1).sum())
    return [{steps: (total / count) ** 0.5 for steps, total in found.items()} for found in squares]


def read_schedule(file: str) -> Schedule:
    """Read a schedule from a JSON file, the argument ``schedule`` of errors."""
    remedy = "give a file written by schedule.py"
    with blame("schedule", file):
        values = read_json(file, remedy)
        try:
            return Schedule.from_dict(values)
        except ValueError as error:
            raise UserError(f"not a schedule ({error}): {remedy}") from None


__all__ = ["COSTS", "FINE", "FittedSchedule", "Solution", "costs", "end_errors", "fine_solutions", "fit"]
