"""From a flow map to samples: noise and label by sample index, batch by batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap, FlowMapInfo
from samplers import euler, rollout

Sampler = Callable[[FlowMap, Tensor, Tensor, Tensor | None], Tensor]  # (fm, x0, times, label) -> samples

SAMPLERS: dict[str, Sampler] = {
    "map": lambda fm, x, times, label: rollout(fm, x, times, label),
    "euler": lambda fm, x, times, label: euler(fm.drift, x, times, label),
}


def labels_for(
    info: FlowMapInfo, n: int, label: int | Sequence[int] | Tensor | None = None, start: int = 0
) -> Tensor | None:
    """Labels int64 [n] of samples ``start`` .. ``start + n - 1``: those given, else sample index mod classes.

    None for an unconditional model; label ``num_classes`` asks a conditional one for "no label".
    """
    classes = info.num_classes
    if not classes:
        if label is not None:
            raise UserError("a label was given, but this model is unconditional: leave it out")
        return None
    if label is None:
        return torch.arange(start, start + n) % classes
    wanted = torch.as_tensor(label, dtype=torch.int64)
    if bool(((wanted < 0) | (wanted > classes)).any()):
        raise UserError(f"label must be 0 .. {classes - 1}, or {classes} for no label, got {label}")
    return wanted.expand(n)


@torch.no_grad()
def generate(
    fm: FlowMap,
    times: Tensor,
    n: int,
    seed: int,
    *,
    sampler: str = "map",
    label: int | None = None,
    batch: int = 500,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (samples [b, *shape], label [b] or None) until ``n`` samples are made with the grid ``times``.

    Sample i depends on (``seed``, i) alone, whatever ``batch`` (to rounding).
    """
    device = next(fm.parameters()).device
    for start in range(0, n, batch):
        size = min(batch, n - start)
        y = labels_for(fm.info, size, label, start)
        y = None if y is None else y.to(device)
        yield SAMPLERS[sampler](fm, fm.noise(size, seed, start), times, y), y
