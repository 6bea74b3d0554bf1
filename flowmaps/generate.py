"""From a flow map to samples: noise and label by sample index, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.guidance import Guided
from flowmaps.info import FlowMapInfo
from flowmaps.networks.conditioning import soft_label, with_guidance
from samplers import euler, heun, rollout, stochastic

Renoise = Callable[[int], Tensor]  # k -> fresh noise for step k

SOLVERS = {"euler": euler, "heun": heun}
# name -> sampler(fm, x0, times, label, renoise, gamma)
SAMPLERS: dict[str, Callable[[FlowMap, Tensor, Tensor, Tensor | None, Renoise, float], Tensor]] = {
    "map": lambda fm, x, times, label, renoise, gamma: rollout(fm, x, times, label),
    "euler": lambda fm, x, times, label, renoise, gamma: euler(fm.drift, x, times, label),
    "heun": lambda fm, x, times, label, renoise, gamma: heun(fm.drift, x, times, label),
    "stochastic": lambda fm, x, times, label, renoise, gamma: stochastic(
        fm, x, times, label, path=fm.interpolant, noise=renoise, gamma=gamma
    ),
}
EVALUATIONS_PER_STEP = {"map": 1, "euler": 1, "heun": 2, "stochastic": 1}


def nfe(info: FlowMapInfo, sampler: str, steps: int, guidance: float | None = None) -> int:
    """Network evaluations of ``steps`` steps: twice as many under guidance that the network does not take itself."""
    twice = guidance not in (None, 1) and info.guidance_max is None
    return steps * EVALUATIONS_PER_STEP[sampler] * (1 + twice)


def labels_for(
    info: FlowMapInfo, n: int, label: int | Sequence[int] | Tensor | None = None, start: int = 0
) -> Tensor | None:
    """Labels int64 [n] of samples ``start`` .. ``start + n - 1``: those given, else sample index mod classes.

    None for an unconditional model; label ``num_classes`` asks one trained with label dropout for "no label".
    """
    classes = info.num_classes
    if not classes:
        if label is not None:
            raise UserError("a label was given, but this model is unconditional: leave it out")
        return None
    if label is None:
        return torch.arange(start, start + n) % classes
    wanted = torch.as_tensor(label, dtype=torch.int64)
    most = classes if info.label_dropout else classes - 1
    if bool(((wanted < 0) | (wanted > most)).any()):
        no_label = f", or {classes} for no label" if info.label_dropout else ""
        raise UserError(f"label must be 0 .. {classes - 1}{no_label}, got {label}")
    return wanted.expand(n)


def guided_label(fm: FlowMap, label: Tensor | None, weight: float | None) -> Tensor | None:
    """``label`` [n] with the guidance ``weight``, as the network takes it; the label itself without a weight."""
    if label is None or weight is None:
        return label
    augment_dim = getattr(getattr(fm.network, "config", None), "augment_dim", 0)
    unchanged = torch.zeros(len(label), augment_dim, device=label.device)
    rows = soft_label(label, unchanged, fm.info.num_classes)
    return with_guidance(rows, torch.full((len(label),), weight, device=label.device), fm.info.num_classes)


@torch.no_grad()
def generate(
    fm: FlowMap,
    times: Tensor,
    n: int,
    seed: int,
    *,
    sampler: str = "map",
    label: int | None = None,
    gamma: float = 1.0,
    guidance: float | None = None,
    batch: int = 500,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (samples [b, *shape], label [b] or None): ``first`` .. ``first + n - 1``, with the grid ``times``.

    Sample i depends on (``seed``, i) alone, whatever ``batch`` (to rounding). ``gamma``: for "stochastic" only.
    ``guidance``: weight for a model that takes one (``FlowMapInfo.guidance_max``), None for 1; a solver guides any
    model that was also trained without labels, classifier-free.
    """
    fm.info.check_sampler(sampler, len(times) - 1, gamma)
    fm.info.check_guidance(guidance, sampler)
    device = next(fm.parameters()).device
    for start in range(first, first + n, batch):
        size = min(batch, first + n - start)
        y = labels_for(fm.info, size, label, start)
        y = None if y is None else y.to(device)
        x0, renoise = fm.noise(size, seed, start), partial(_renoise, fm, size, seed, start)
        if guidance is not None and fm.info.guidance_max is None:
            yield SOLVERS[sampler](Guided(fm.drift, guidance, fm.info.num_classes), x0, times, y), y
        else:
            yield SAMPLERS[sampler](fm, x0, times, guided_label(fm, y, guidance), renoise, gamma), y


def _renoise(fm: FlowMap, n: int, seed: int, start: int, step: int) -> Tensor:
    return fm.noise(n, seed, start, draw=step + 1)
