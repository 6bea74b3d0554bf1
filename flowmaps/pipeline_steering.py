"""A pipeline's call that is steered, or starts from pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmaps.editing import inverting_sampler, rebuild
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import check_steering, spread
from flowmaps.labels import Label, labels_for
from flowmaps.pipeline_parts import Generators, start
from flowmaps.rewards import as_reward, check_size, measured, pictures
from samplers.steer import Reward, Steered, steer

Guided = Callable[[Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Watched:
    """The callback of a steered call: it sees the particles [n P, ...] after each step, and may interrupt the call."""

    pipe: Any
    call: Any
    timesteps: Tensor
    callback: Any

    def __call__(self, k: int, t: Tensor, state: Steered) -> None:
        if not k:
            return
        if self.callback is not None and self.callback(self.pipe, k - 1, self.timesteps[k - 1], {"latents": state.x}):
            raise UserError("must return nothing: steered particles have weights", field="callback_on_step_end")
        if self.call.interrupted:
            raise Interrupted(state)


class Interrupted(Exception):
    """A steered call was interrupted, and returns what it has."""

    def __init__(self, state: Steered) -> None:
        super().__init__()
        self.state = state


@dataclass(frozen=True)
class Asked:
    """The arguments of a pipeline's call that steer it or start it from pictures."""

    measurement: Any
    mask: Any
    measurement_std: float
    reward: Any
    reward_scale: float
    particles: int
    invert: Any
    edit_labels: Label | None

    @property
    def steers(self) -> bool:
        """True if there is a reward or a measurement."""
        return self.reward is not None or self.measurement is not None

    @property
    def special(self) -> bool:
        """True if there is any of the arguments."""
        return self.steers or self.invert is not None

    def given(self, fm: FlowMap, latents: Tensor | None) -> Tensor | None:
        """Return the pictures of ``measurement`` or ``invert`` [n, C, h, w] in [-1, 1], if there are any.

        Raises:
            UserError: Arguments exclude each other or lack another one, or a picture does not fit.
        """
        named = [name for name in ("measurement", "reward", "invert") if getattr(self, name) is not None]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} exclude each other: choose one")
        for name, needed in (("mask", "measurement"), ("edit_labels", "invert")):
            if getattr(self, name) is not None and needed not in named:
                raise UserError(f"needs {needed}: give both, or leave this out", field=name)
        if self.special and latents is not None:
            raise UserError(f"has no effect with {named[0]}: leave it out", field="latents")
        if self.steers:
            check_steering("stochastic", 1.0, self.particles)
        if self.invert is not None:
            inverting_sampler(fm.info)
            x = pictures(fm.info, self.invert, "invert")
            check_size(x.shape[2:], fm.info.shape[1:], "invert")
            return x
        return None if self.measurement is None else pictures(fm.info, self.measurement, "measurement")

    def count(self, given: Tensor | None) -> dict[str, int]:
        """Return the number of samples that the pictures ask for, if they do; one measurement is for all samples."""
        if given is None or (self.invert is None and len(given) == 1):
            return {}
        return {"measurement" if self.invert is None else "invert": len(given)}

    def made(
        self,
        fm: FlowMap,
        given: Tensor | None,
        grid: Tensor,
        n: int,
        class_labels: Label | None,
        guided: Guided,
        generator: Generators,
        device: torch.device,
        dtype: torch.dtype,
        watch: Watched,
    ) -> Tensor:
        """Return the n samples; ``given`` are the pictures."""
        if self.invert is None:
            reward = self._reward(fm, given, device)
            return _steered(fm, reward, self.particles, grid, n, class_labels, guided, generator, device, dtype, watch)
        assert given is not None
        if fm.info.num_classes and class_labels is None:
            raise UserError("missing: give the classes of the images to invert", field="class_labels")
        label = labels_for(fm.info, n, class_labels, field="class_labels")
        other = None
        if self.edit_labels is not None:
            other = labels_for(fm.info, n, self.edit_labels, field="edit_labels")
        label, other = (None if y is None else y.to(device) for y in (label, other))
        return rebuild(fm, given.to(device, dtype), grid, label, other).samples

    def _reward(self, fm: FlowMap, given: Tensor | None, device: torch.device) -> Reward:
        if given is None:
            return as_reward(fm, self.reward, self.reward_scale)
        mask = None if self.mask is None else pictures(fm.info, self.mask, "mask", 1) / 2 + 0.5
        if len(given) > 1:  # one for each sample, and so for its particles
            given = given.repeat_interleave(self.particles, dim=0)
            mask = mask.repeat_interleave(self.particles, dim=0) if mask is not None and len(mask) > 1 else mask
        return measured(fm.info, given / 2 + 0.5, mask, std=self.measurement_std, device=device)


def _steered(
    fm: FlowMap,
    reward: Reward,
    particles: int,
    grid: Tensor,
    n: int,
    class_labels: Label | None,
    guided: Guided,
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    watch: Watched,
) -> Tensor:
    """Return n samples, one particle of each by weight; without ``class_labels`` the weights choose the class too."""
    rows = n * particles
    shared = class_labels is not None or bool(fm.info.condition)  # by the particles of a sample
    each = 1 if shared else particles
    label = labels_for(fm.info, n * each, class_labels, field="class_labels")
    label = None if label is None else label.repeat_interleave(particles // each, dim=0).to(device)
    streams = (
        [stream for stream in generator for _ in range(particles)] if isinstance(generator, Sequence) else generator
    )

    def uniform(step: int) -> Tensor:
        if isinstance(generator, Sequence):
            return torch.cat([torch.rand(1, generator=stream, device=stream.device).cpu() for stream in generator])
        return torch.rand(n, generator=generator, device="cpu" if generator is None else generator.device)

    def noise(step: int) -> Tensor:
        return start(fm, rows, streams, None, device, dtype)

    try:
        found = steer(
            fm,
            noise(0),
            grid,
            reward,
            guided(label),
            watch,
            path=fm.interpolant,
            noise=noise,
            uniform=uniform,
            base_std=fm.base_std,
            data_std=spread(fm, class_labels if fm.info.condition else None, guided),
            particles=particles,
        )
    except Interrupted as stop:
        found = stop.state
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error), field="reward") from None
    picked: Tensor = found.x[found.pick(uniform(len(grid)))]
    return picked
