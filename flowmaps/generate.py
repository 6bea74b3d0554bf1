"""From a flow map to samples: noise and label by sample index, batch by batch."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.guidance import Guided
from flowmaps.info import FlowMapInfo
from flowmaps.networks.conditioning import soft_label, with_guidance
from samplers import SAMPLERS
from samplers.callables import Drift

GOLDEN = (5**0.5 - 1) / 2  # whose multiples, mod 1, fill any interval evenly


def nfe(info: FlowMapInfo, sampler: str, steps: int, guidance: float | None = None) -> int:
    """Return the network evaluations of ``steps`` steps; classifier-free guidance of a solver doubles them."""
    twice = guidance not in (None, 1) and info.guidance_max is None
    return steps * SAMPLERS[sampler].nfe * (1 + twice)


def check_sampling(
    fm: FlowMap, sampler: str, steps: int = 1, gamma: float = 1.0, guidance: float | None = None
) -> None:
    """Refuse a way to sample that ``fm`` was not trained for or that its path does not allow: ``UserError``."""
    fm.info.check_sampler(sampler, steps, gamma)
    fm.info.check_guidance(guidance, sampler)
    if SAMPLERS[sampler].linear and fm.interpolant_name != "linear":
        raise UserError(
            f"is for the linear path only, but this model has the {fm.interpolant_name} path: use heun",
            field="sampler",
            value=sampler,
        )


def labels_for(
    info: FlowMapInfo, n: int, label: int | Sequence[int] | Tensor | None = None, start: int = 0
) -> Tensor | None:
    """Return labels int64 [n] of samples ``start`` .. ``start + n - 1``: the given ones, else index mod classes.

    If the training images had classes of unequal shares, any stretch of samples has them in these shares, so that a
    score compares like with like: sample i has the class at i times the golden ratio, mod 1, of their cumulative sum.
    None for an unconditional model; label ``num_classes`` asks a model trained with label dropout for "no label".
    """
    classes = info.num_classes
    if not classes:
        if label is not None:
            raise UserError("this model is unconditional: leave label out", field="label", value=label)
        return None
    if label is None:
        index = torch.arange(start, start + n)
        if not info.class_shares:
            return index % classes
        ends = torch.tensor(info.class_shares, dtype=torch.float64).cumsum(0)
        return torch.searchsorted(ends[:-1].contiguous(), index.double() * GOLDEN % 1, right=True)
    wanted = torch.as_tensor(label, dtype=torch.int64)
    most = classes if info.label_dropout else classes - 1
    if bool(((wanted < 0) | (wanted > most)).any()):
        no_label = f", or {classes} for no label" if info.label_dropout else ""
        raise UserError(f"must be 0 .. {classes - 1}{no_label}", field="label", value=label)
    return wanted.expand(n)


def guided_label(fm: FlowMap, label: Tensor | None, weight: float | None) -> Tensor | None:
    """Return ``label`` [n] with the guidance ``weight`` attached, if ``fm`` takes one; else the label itself."""
    if label is None or weight is None or fm.info.guidance_max is None:
        return label
    augment_dim = getattr(getattr(fm.network, "config", None), "augment_dim", 0)
    unchanged = torch.zeros(len(label), augment_dim, device=label.device)
    rows = soft_label(label, unchanged, fm.info.num_classes)
    return with_guidance(rows, torch.full((len(label),), weight, device=label.device), fm.info.num_classes)


def guided_drift(fm: FlowMap, weight: float | None) -> Drift:
    """Return the drift under guidance: classifier-free, unless the network takes the weight with the label."""
    if weight is None or fm.info.guidance_max is not None:
        return fm.drift
    return Guided(fm.drift, weight, fm.info.num_classes)


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
    """Yield samples ``first`` .. ``first + n - 1`` and their labels, batch by batch.

    Sample i depends on (``seed``, i) alone, whatever ``batch`` is (up to rounding).

    Args:
        fm: The model, on the device to sample on.
        times: Increasing times from 0 to 1, one more than there are steps.
        n: The number of samples.
        seed: The seed of their noise.
        sampler: A key of ``samplers.SAMPLERS``.
        label: The class of all samples; None gives them those of ``labels_for``.
        gamma: The share of noise that ``sampler="stochastic"`` renews per step.
        guidance: The weight for a model that takes one (``FlowMapInfo.guidance_max``), None for 1. ODE solvers guide
            any model that was also trained without labels (classifier-free guidance).
        batch: Samples at a time.
        first: The index of the first sample.

    Yields:
        (samples [b, *shape], labels int64 [b], or None for an unconditional model).

    Raises:
        UserError: The model was not trained for the sampler, the label or the guidance.

    Example:
        >>> fm = FlowMap.from_pretrained("assets/digits")
        >>> for images, labels in generate(fm, uniform_times(2), n=1000, seed=0):
        ...     print(images.shape, labels.shape)
        torch.Size([500, 1, 8, 8]) torch.Size([500])
        torch.Size([500, 1, 8, 8]) torch.Size([500])
    """
    check_sampling(fm, sampler, len(times) - 1, gamma, guidance)
    row, device = SAMPLERS[sampler], next(fm.parameters()).device
    model = fm if row.of == "map" else guided_drift(fm, guidance)
    for start in range(first, first + n, batch):
        size = min(batch, first + n - start)
        y = labels_for(fm.info, size, label, start)
        y = None if y is None else y.to(device, non_blocking=True)
        x0, options = fm.noise(size, seed, start), {}
        if row.renoises:
            options = {"path": fm.interpolant, "noise": partial(_renoise, fm, size, seed, start), "gamma": gamma}
        yield row.run(model, x0, times, guided_label(fm, y, guidance), **options), y


def _renoise(fm: FlowMap, n: int, seed: int, start: int, step: int) -> Tensor:
    return fm.noise(n, seed, start, draw=step + 1)
