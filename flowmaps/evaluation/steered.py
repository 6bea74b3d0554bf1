"""Samples that do not come from a model alone, steered or made of a picture, and the record that says so."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowmaps.editing import ITERATIONS, rebuild
from flowmaps.evaluation.samples import sample_batches
from flowmaps.evaluation.settings import Setting
from flowmaps.flow_map import FlowMap
from flowmaps.generate import nfe
from samplers.measurement import Measurement
from samplers.steer import Reward, Steered

Record = dict[str, Any]
Batches = Iterator[tuple[Tensor, Tensor | None]]


def steered_batches(
    fm: FlowMap,
    setting: Setting,
    num: int,
    seed: int,
    reward: Reward,
    particles: int,
    record: Record,
    **options: Any,
) -> Batches:
    """Yield ``num`` steered samples and their labels, batch by batch; afterwards ``record`` holds how they were made.

    It has the network evaluations per sample (``nfe``), the effective number of particles / P after each look-ahead
    (``ess``), and of a measurement the rms of y - A x (``seen_rms``). ``options`` are those of ``generate``.
    """
    shares, weights, errors = list[Tensor](), list[int](), list[Tensor]()

    def watch(k: int, t: Tensor, state: Steered) -> None:
        if k == setting.steps:
            shares.append(state.ess.cpu())
            weights.append(len(state.log_weights))

    options |= {"reward": reward, "particles": particles, "watch": watch, "sampler": setting.sampler}
    for x, label in sample_batches(fm, setting.times, range(num), seed, progress=True, **options):
        if isinstance(reward, Measurement):
            errors.append(reward.error(x).cpu())
        yield x, label
    each = torch.tensor(weights, dtype=torch.float64)
    evaluations = nfe(fm.info, setting.sampler, setting.steps, options.get("guidance"), particles)
    record |= {"steps": setting.steps, "nfe": evaluations, "particles": particles, "seed": seed, "num": num}
    record["ess"] = (each @ torch.stack(shares) / each.sum()).tolist()
    if errors:
        record["seen_rms"] = torch.cat(errors).square().mean().sqrt().item()
    _add_model(record, fm, setting)


def rebuilt_batches(
    fm: FlowMap, setting: Setting, picture: tuple[Tensor, Tensor | None, Tensor | None], record: Record
) -> Batches:
    """Yield the picture rebuilt from its noise, under another label if there is one; ``record`` then has the error.

    ``picture`` are images [n, C, H, W], their labels and the other labels [n]. ``rms`` is the root mean square of
    reconstruction - picture under their own labels, also of an edit.
    """
    device = next(fm.parameters()).device
    x, label, other = (None if part is None else part.to(device) for part in picture)
    assert x is not None
    found = rebuild(fm, x, setting.times, label, other)
    yield found.samples, label if other is None else other
    record |= {"steps": setting.steps, "nfe": found.nfe, "iterations": ITERATIONS}
    record["rms"] = found.error.square().mean().sqrt().item()
    _add_model(record, fm, setting)


def _add_model(record: Record, fm: FlowMap, setting: Setting) -> None:
    record |= {"sampler": setting.sampler, "times": setting.times.tolist(), "weights": fm.fingerprint()}
