"""From a flow map to samples: noise and label by sample index, batch by batch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.guidance import Guided
from flowmaps.info import FlowMapInfo
from flowmaps.labels import BALANCED, Label, sample_labels
from flowmaps.networks.conditioning import soft_label, with_guidance
from flowmaps.networks.conditions import condition_rows
from samplers import SAMPLERS, check_times
from samplers.callables import Drift
from samplers.grids import STEP_COUNT, Times, is_step_count

Interval = tuple[float, float] | None


def nfe(info: FlowMapInfo, sampler: str, steps: int, guidance: float | None = None) -> int:
    """Return the network evaluations of ``steps`` steps; classifier-free guidance of a solver doubles them."""
    twice = guidance not in (None, 1) and info.guidance_max is None
    return steps * SAMPLERS[sampler].nfe * (1 + twice)


def check_sampling(
    fm: FlowMap,
    sampler: str,
    steps: int = 1,
    gamma: float = 1.0,
    guidance: float | None = None,
    interval: Interval = None,
) -> None:
    """Refuse a way to sample that ``fm`` was not trained for or that its path does not allow: ``UserError``."""
    check_steps(steps)
    fm.info.check_sampler(sampler, steps, gamma)
    fm.info.check_guidance(guidance, sampler, interval)
    if SAMPLERS[sampler].linear and fm.interpolant_name != "linear":
        raise UserError(
            f"is for the linear path only, but this model has the {fm.interpolant_name} path: use heun",
            field="sampler",
            value=sampler,
        )


def check_steps(steps: object, field: str = "steps") -> None:
    """Refuse what is not a number of steps, such as 0 or NaN: ``UserError``."""
    if not is_step_count(steps):
        raise UserError(f"must be {STEP_COUNT}", field=field, value=steps)


def check_grid(times: Times, field: str = "times") -> Tensor:
    """Return ``times`` as a grid from noise (0) to data (1): ``UserError`` if they are none."""
    try:
        grid = check_times(times)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), field=field) from None
    if float(grid[0]) != 0 or float(grid[-1]) != 1:
        raise UserError("must lead from noise (time 0) to data (time 1)", field=field, value=grid.tolist())
    return grid


def guided_label(fm: FlowMap, label: Tensor | None, weight: float | None, interval: Interval = None) -> Tensor | None:
    """Return ``label`` [n] with the guidance ``weight`` and its times attached, if ``fm`` takes one.

    Conditions are rows in any case (``networks.conditioning``).
    """
    label = condition_rows(label, fm.info.condition)
    if label is None or weight is None or fm.info.guidance_max is None:
        return label
    augment_dim = getattr(getattr(fm.network, "config", None), "augment_dim", 0)
    unchanged = torch.zeros(len(label), augment_dim, device=label.device)
    rows = soft_label(label, unchanged, fm.info.label_size)
    told = torch.tensor([weight, *(interval or ())], dtype=torch.float32, device=label.device)
    return with_guidance(rows, told.expand(len(label), -1), fm.info.label_size)


def guided_drift(fm: FlowMap, weight: float | None) -> Drift:
    """Return the drift under guidance: classifier-free, unless the network takes the weight with the label."""
    if weight is None or fm.info.guidance_max is not None:
        return fm.drift
    return Guided(fm.drift, weight, fm.info.label_size)


@torch.no_grad()
def generate(
    fm: FlowMap,
    times: Times,
    n: int,
    seed: int,
    *,
    sampler: str = "map",
    label: Label | None = None,
    gamma: float = 1.0,
    guidance: float | None = None,
    guidance_interval: Interval = None,
    batch: int = 500,
    first: int = 0,
    label_policy: str | Tensor = BALANCED,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield samples ``first`` .. ``first + n - 1`` and their labels, batch by batch.

    Sample i depends on (``seed``, i) alone, whatever ``batch`` is (up to rounding).

    Args:
        fm: The model, on the device to sample on.
        times: Increasing times from 0 to 1, one more than there are steps.
        n: The number of samples.
        seed: The seed of their noise.
        sampler: A key of ``samplers.SAMPLERS``.
        label: The class of all samples, by number or name; None gives them those of ``label_policy``. Of a model with a
            condition: conditions [m, *condition], of which sample i has row i mod m; None gives them ``fm.conditions``.
        gamma: The share of noise that ``sampler="stochastic"`` renews per step.
        guidance: The weight for a model that takes one (``FlowMapInfo.guidance_max``), None for 1. ODE solvers guide
            any model that was also trained without labels (classifier-free guidance).
        guidance_interval: The times from which and up to which the weight applies, for a model that takes them
            (``FlowMapInfo.guidance_interval``), None for all times.
        batch: Samples at a time.
        first: The index of the first sample.
        label_policy: How samples without a ``label`` get theirs: see ``flowmaps.labels.sample_labels``.

    Yields:
        (samples [b, *shape], labels int64 [b] or conditions [b, ...], or None for an unconditional model).

    Raises:
        UserError: The model was not trained for the sampler, the label or the guidance, or the times do not lead from
            noise to data.

    Example:
        >>> fm = FlowMap.from_pretrained("assets/digits")
        >>> for images, labels in generate(fm, uniform_times(2), n=1000, seed=0):
        ...     print(images.shape, labels.shape)
        torch.Size([500, 1, 8, 8]) torch.Size([500])
        torch.Size([500, 1, 8, 8]) torch.Size([500])
    """
    grid = check_grid(times)
    check_sampling(fm, sampler, len(grid) - 1, gamma, guidance, guidance_interval)
    row, device = SAMPLERS[sampler], next(fm.parameters()).device
    model = fm if row.of == "map" else guided_drift(fm, guidance)
    for start in range(first, first + n, batch):
        size = min(batch, first + n - start)
        given = fm.conditions if label is None else label
        y = sample_labels(fm.info, start, size, seed, given, label_policy)
        y = None if y is None else y.to(device, non_blocking=True)
        x0, options = fm.noise(size, seed, start), {}
        if row.renoises:
            options = {"path": fm.interpolant, "noise": partial(_renoise, fm, size, seed, start), "gamma": gamma}
        yield row.run(model, x0, grid, guided_label(fm, y, guidance, guidance_interval), **options), y


def _renoise(fm: FlowMap, n: int, seed: int, start: int, step: int) -> Tensor:
    return fm.noise(n, seed, start, draw=step + 1)
